// As llama.cpp runs a file on this CPU; numbers on stdin and stdout are int32 and float32 of this machine.
//
//   llama-logits logits MODEL TOKENS            for each sequence a count and its ids: logits [count, vocabulary]
//   llama-logits answers MODEL TOKENS SEQUENCES NEW STOP...
//                                               for each prompt a count and its ids, at the end of stdin: for each, in
//                                               the order they end, its index, a count, and the ids that follow greedily,
//                                               up to one of STOP, which is among them, or NEW
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif
#include "llama.h"

static llama_batch batch;
static llama_context * context;
static size_t vocab;

static void add(llama_token token, int position, int sequence, bool logits) {
    const int i = batch.n_tokens++;
    batch.token[i] = token;
    batch.pos[i] = position;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = sequence;
    batch.logits[i] = logits;
}

static llama_token best(int i) {
    const float * logits = llama_get_logits_ith(context, i);
    return (llama_token) (std::max_element(logits, logits + vocab) - logits);
}

static bool read_ids(std::vector<llama_token> & ids) {
    int32_t count;
    if (std::fread(&count, sizeof count, 1, stdin) != 1 || count < 1) return false;
    ids.resize((size_t) count);
    return std::fread(ids.data(), sizeof(llama_token), ids.size(), stdin) == ids.size();
}

static int all_logits(size_t most) {
    for (std::vector<llama_token> ids; read_ids(ids); std::fflush(stdout)) {
        if (ids.size() > most) return 5;
        batch.n_tokens = 0;
        for (size_t i = 0; i < ids.size(); ++i) add(ids[i], (int) i, 0, true);
        llama_memory_clear(llama_get_memory(context), true);
        if (llama_decode(context, batch)) return 6;
        for (size_t i = 0; i < ids.size(); ++i) {
            if (std::fwrite(llama_get_logits_ith(context, (int) i), sizeof(float), vocab, stdout) != vocab) return 7;
        }
    }
    return 0;
}

struct Going {
    int32_t index = -1, position = 0;
    std::vector<llama_token> made;
};

static int answers(size_t most, size_t sequences, size_t room, const std::vector<llama_token> & stops) {
    std::vector<std::vector<llama_token>> prompts;
    for (std::vector<llama_token> ids; read_ids(ids);) prompts.push_back(ids);
    std::vector<Going> going(sequences);
    for (size_t next = 0;;) {
        for (size_t k = 0; k < sequences; ++k) {
            Going & one = going[k];
            if (one.index >= 0 || next == prompts.size()) continue;
            const auto & prompt = prompts[next];
            if (prompt.size() + room > most) return 5;
            one = {(int32_t) next++, (int32_t) prompt.size(), {}};
            llama_memory_seq_rm(llama_get_memory(context), (llama_seq_id) k, -1, -1);
            batch.n_tokens = 0;
            for (size_t i = 0; i < prompt.size(); ++i) add(prompt[i], (int) i, (int) k, i + 1 == prompt.size());
            if (llama_decode(context, batch)) return 6;
            one.made.push_back(best((int) prompt.size() - 1));
        }
        batch.n_tokens = 0;
        for (size_t k = 0; k < sequences; ++k) {
            Going & one = going[k];
            if (one.index < 0) continue;
            if (one.made.size() == room || std::count(stops.begin(), stops.end(), one.made.back())) {
                const int32_t told[2] = {one.index, (int32_t) one.made.size()};
                std::fwrite(told, sizeof told, 1, stdout);
                std::fwrite(one.made.data(), sizeof(llama_token), one.made.size(), stdout);
                std::fflush(stdout);
                one.index = -1;
            } else {
                add(one.made.back(), one.position++, (int) k, true);
            }
        }
        if (!batch.n_tokens && next == prompts.size()) return 0;
        if (!batch.n_tokens) continue;
        if (llama_decode(context, batch)) return 6;
        int i = 0;
        for (Going & one : going) {
            if (one.index >= 0) one.made.push_back(best(i++));
        }
    }
}

int main(int argc, char ** argv) {
    if (argc < 4) return 2;
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    const bool of_logits = !std::strcmp(argv[1], "logits"), of_answers = !std::strcmp(argv[1], "answers");
    if ((!of_logits && !of_answers) || (of_answers && argc < 6)) return 2;
    const int tokens = std::atoi(argv[3]), sequences = of_answers ? std::atoi(argv[4]) : 1;
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[2], llama_model_default_params());
    if (!model) return 3;
    llama_context_params params = llama_context_default_params();
    params.n_batch = params.n_ubatch = (uint32_t) std::max(tokens, sequences);
    params.n_ctx = (uint32_t) (tokens * sequences);
    params.n_seq_max = (uint32_t) sequences;
    params.n_threads = params.n_threads_batch = (int32_t) std::thread::hardware_concurrency();
    context = llama_init_from_model(model, params);
    if (!context) return 4;
    vocab = (size_t) llama_vocab_n_tokens(llama_model_get_vocab(model));
    batch = llama_batch_init((int32_t) params.n_batch, 0, 1);
    if (of_logits) return all_logits((size_t) tokens);
    std::vector<llama_token> stops;
    for (int i = 6; i < argc; ++i) stops.push_back(std::atoi(argv[i]));
    return answers((size_t) tokens, (size_t) sequences, (size_t) std::atoi(argv[5]), stops);
}
