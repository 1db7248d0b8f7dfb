// llama-logits MODEL MAX_TOKENS: as llama.cpp runs the file on this CPU.
// stdin: for each sequence an int32 count and that many int32 ids. stdout: float32 logits [count, vocabulary] of each.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif
#include "llama.h"

int main(int argc, char ** argv) {
    if (argc != 3) return 2;
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 3;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = (uint32_t) std::atoi(argv[2]);
    params.n_threads = params.n_threads_batch = (int32_t) std::thread::hardware_concurrency();
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return 4;
    const size_t vocab = (size_t) llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_batch batch = llama_batch_init((int32_t) params.n_batch, 0, 1);
    for (int32_t count; std::fread(&count, sizeof count, 1, stdin) == 1; std::fflush(stdout)) {
        if (count < 1 || (uint32_t) count > params.n_batch) return 5;
        if (std::fread(batch.token, sizeof(llama_token), (size_t) count, stdin) != (size_t) count) return 5;
        batch.n_tokens = count;
        for (int32_t i = 0; i < count; ++i) {
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = 1;
        }
        llama_memory_clear(llama_get_memory(context), true);
        if (llama_decode(context, batch)) return 6;
        for (int32_t i = 0; i < count; ++i) {
            if (std::fwrite(llama_get_logits_ith(context, i), sizeof(float), vocab, stdout) != vocab) return 7;
        }
    }
    return 0;
}
