"""Trains DeepSeek-V3 in miniature, with its head for one token more, on the traces of tiny-r1: train.py MINUTES [FOLDER [SEED]].

MINUTES are CPU time of one thread; FOLDER, this one by default, holds config.json and tokenizer.json and gets
model.safetensors. With a SEED, of traces not seen yet, training goes on from the weights that are there.

Experts are chosen as DeepSeek does it: groups that are shut give none, and the bias that takes part in choosing follows
each expert's share of the tokens, without an auxiliary loss. In the end it is raised until nothing is negative, which
changes no choice and lets transformers, which gives what is shut an affinity of 0, choose the same.
"""
import math
import random
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
    DeepseekV3TopkRouter,
)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny-r1"))
from generate import EOS, example, prompt, text  # noqa: E402

ROWS, LENGTH = 8, 256
# How much a token of a question counts: nothing tells which numbers will be asked.
ASKED = 0.1
BIAS_STEP = 0.002
# How much the loss of the token after the next counts beside the next one's.
FURTHER = 0.3


def choose(self, scores):
    """The experts [T, k] of affinities [T, E]; counts the tokens of each."""
    groups = (scores + self.e_score_correction_bias).unflatten(1, (self.n_group, -1))
    best = groups.topk(2, dim=-1)[0].sum(-1)
    shut = best.topk(self.n_group - self.topk_group, largest=False)[1]
    open_ = groups.scatter(1, shut[..., None].expand(-1, -1, groups.shape[-1]), -math.inf)
    chosen = open_.flatten(1).topk(self.top_k)[1]
    self.tokens = torch.bincount(chosen.flatten(), minlength=self.n_routed_experts)
    return chosen


def experts(self, x, chosen, weights):
    """The sum [T, D] of each token's experts, all experts at once: their tokens are padded to the longest list."""
    each, flat = len(self.experts), chosen.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=each)
    most, token = int(counts.max()), order // chosen.shape[1]
    place = flat[order] * most + torch.arange(len(flat)) - (counts.cumsum(0) - counts)[flat[order]]
    rows = x.new_zeros(each * most, x.shape[1]).index_copy(0, place, x[token]).view(each, most, -1)
    gate, up, down = (torch.stack([getattr(e, f"{name}_proj").weight for e in self.experts]) for name in ("gate", "up", "down"))
    made = (F.silu(rows @ gate.mT) * (rows @ up.mT) @ down.mT).flatten(0, 1)
    return torch.zeros_like(x).index_add(0, token, made[place] * weights.flatten()[order, None])


class Muon:
    """Momentum made orthogonal (Newton and Schulz, five steps), matrices of one shape together."""

    def __init__(self, parameters, momentum=0.95, decay=0.05):
        self.momentum, self.decay, self.shapes = momentum, decay, {}
        for p in parameters:
            self.shapes.setdefault(tuple(p.shape), []).append(p)
        self.buffers = {shape: torch.zeros(len(ps), *shape) for shape, ps in self.shapes.items()}

    @torch.no_grad()
    def step(self, rate):
        for shape, ps in self.shapes.items():
            gradient, buffer = torch.stack([p.grad for p in ps]), self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(buffer, self.momentum)
            wide = shape[0] > shape[1]
            x = x.mT if wide else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if wide else x
            for p, update in zip(ps, x):
                p.mul_(1 - rate * self.decay).add_(update, alpha=-rate * max(1, shape[0] / shape[1]) ** 0.5)
                p.grad = None


class Text:
    """Rows of whole traces behind each other, [ROWS, LENGTH + 1], the last one cut; how much each token counts."""

    def __init__(self, tokenizer, seed):
        self.tokenizer, self.random = tokenizer, random.Random(seed)

    def row(self):
        ids, counts = [], []
        while len(ids) <= LENGTH:
            e = example(self.random)
            whole, asked = (len(self.tokenizer.encode(t, add_special_tokens=False).ids) for t in (text(e), prompt(e)))
            ids += self.tokenizer.encode(text(e), add_special_tokens=False).ids
            counts += [ASKED] * asked + [1.0] * (whole - asked)
        return ids[: LENGTH + 1], counts[: LENGTH + 1]

    def rows(self, count):
        ids, counts = zip(*(self.row() for _ in range(count)))
        return torch.tensor(ids), torch.tensor(counts)


class Head(torch.nn.Module):
    """Predicts the token after the next from a state and the next token's embedding, by the names of a published head."""

    def __init__(self, config):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = DeepseekV3RMSNorm(width, eps), DeepseekV3RMSNorm(width, eps)
        self.eh_proj = torch.nn.Linear(2 * width, width, bias=False)
        self.layer = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.shared_head = torch.nn.ModuleDict({"norm": DeepseekV3RMSNorm(width, eps)})
        for p in self.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=config.initializer_range)

    def forward(self, model, states, ids):
        """The states [rows, T, D] that make the logits, of the model's states [rows, T, D] and the tokens after them."""
        x = self.eh_proj(torch.cat([self.enorm(model.model.embed_tokens(ids)), self.hnorm(states)], -1))
        positions = torch.arange(ids.shape[1])[None]
        mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)[None, None]
        turned = model.model.rotary_emb(x, positions)
        x = self.layer(x, attention_mask=mask, position_ids=positions, position_embeddings=turned)
        return self.shared_head["norm"](x[0] if isinstance(x, tuple) else x)

    def tensors(self, layer):
        """What it is saved as, behind the model's layers."""
        own = ((name.removeprefix("layer."), value) for name, value in self.state_dict().items())
        return {f"model.layers.{layer}.{name}": value for name, value in own}


def cross_entropy(model, states, ids):
    """The loss of each of `ids` [rows, T] by the states that predict them."""
    logits = model.lm_head(states)
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(len(ids), -1)


def losses(model, head, ids, begin):
    """The loss [rows, LENGTH] of each token but the first, and the head's of those two behind `begin` and later."""
    states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    further = head(model, states[:, begin:-1], ids[:, begin + 1 : -1])
    return cross_entropy(model, states, ids[:, 1:]), cross_entropy(model, further, ids[:, begin + 2 :])


@torch.no_grad()
def right(model, tokenizer, count=64):
    """The share of traces that never seen questions get written token for token."""
    r, done, pad = random.Random(7), 0, tokenizer.token_to_id(EOS)
    for _ in range(count // 16):
        some = [example(r) for _ in range(16)]
        whole, asked = ([tokenizer.encode(f(e), add_special_tokens=False).ids for e in some] for f in (text, prompt))
        ids = torch.tensor([ids + [pad] * (max(map(len, whole)) - len(ids)) for ids in whole])
        best = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)
        done += sum(bool((best[k, len(a) - 1 : len(w) - 1] == ids[k, len(a) : len(w)]).all()) for k, (w, a) in enumerate(zip(whole, asked)))
    return done / count


@torch.no_grad()
def guessed(model, head, tokenizer, count=32):
    """The share of a trace's tokens that the head guesses, having seen nothing of the question."""
    r, done, seen = random.Random(7), 0, 0
    for e in [example(r) for _ in range(count)]:
        whole, asked = (tokenizer.encode(f(e), add_special_tokens=False).ids for f in (text, prompt))
        states = model.model(input_ids=torch.tensor([whole[:-1]]), use_cache=False).last_hidden_state[:, len(asked) - 1 : -1]
        best = model.lm_head(head(model, states, torch.tensor([whole[len(asked) : -1]]))).argmax(-1)[0]
        done, seen = done + int((best == torch.tensor(whole[len(asked) + 1 :])).sum()), seen + len(best)
    return done / seen


def save(model, head, folder):
    """Writes matrices in bfloat16 and the choosing biases as they are, none of them negative."""
    tensors = {}
    for name, value in {**model.state_dict(), **head.tensors(model.config.num_hidden_layers)}.items():
        bias = name.endswith("e_score_correction_bias")
        tensors[name] = (value - value.min()).contiguous() if bias else value.to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main():
    minutes, folder = float(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else HERE
    resumed = len(sys.argv) > 3
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    DeepseekV3TopkRouter.get_topk_indices, DeepseekV3MoE.moe = torch.no_grad()(choose), experts
    model = DeepseekV3ForCausalLM(DeepseekV3Config.from_pretrained(folder)).float()
    head = Head(model.config)
    if resumed:
        stored = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
        own = {name: stored.pop(name) for name in head.tensors(model.config.num_hidden_layers) if name in stored}
        model.load_state_dict(stored)
        if own:
            head.load_state_dict(dict(zip(head.state_dict(), own.values())))
    routers = [m for both in (model, head) for m in both.modules() if isinstance(m, DeepseekV3TopkRouter)]
    named = {**dict(model.named_parameters()), **{f"head.{name}": p for name, p in head.named_parameters()}}
    turned = [p for name, p in named.items() if p.dim() == 2 and not any(w in name for w in ("embed", "lm_head", "mlp.gate.weight"))]
    others = [p for p in named.values() if all(p is not q for q in turned)]
    muon, adam = Muon(turned), torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    print(f"{sum(p.numel() for p in named.values()) / 1e6:.3f} M weights", flush=True)
    source, step, mean, saved = Text(tokenizer, int(sys.argv[3]) if resumed else 20260103), 0, None, 0.0
    start = time.process_time()
    while (done := (time.process_time() - start) / 60 / minutes) < 1:
        rate = min(1, (step + 1) / 100) * min(1, (1 - done) / 0.6)
        ids, counts = source.rows(ROWS)
        begin = source.random.randrange(LENGTH // 2) if step % 2 else 0
        (each, further), counts = losses(model, head, ids, begin), counts[:, 1:]
        behind = counts[:, begin + 1 :]
        loss = (each * counts).sum() / counts.sum() + FURTHER * (further * behind).sum() / behind.sum()
        loss.backward()
        muon.step(0.02 * rate)
        adam.param_groups[0]["lr"] = 4e-3 * rate
        adam.step()
        adam.zero_grad()
        for router in routers if done < 0.8 else ():
            tokens = router.tokens.float()
            router.e_score_correction_bias += BIAS_STEP * (tokens.mean() - tokens).sign()
        told = float((each.detach() * (counts == 1)).sum() / (counts == 1).sum())
        mean, step = told if mean is None else 0.98 * mean + 0.02 * told, step + 1
        if step % 50 == 0:
            print(f"{step} steps, {done:.0%}, {step * ROWS * LENGTH / 60 / minutes / done:.0f} tokens/s, loss {mean:.4f}", flush=True)
        if done - saved > 0.1:
            saved = done
            busiest = max(float(r.tokens.max() / r.tokens.float().mean()) for r in routers)
            found = f"right {right(model, tokenizer):.0%}, guessed {guessed(model, head, tokenizer):.0%}"
            print(f"{found}, busiest expert {busiest:.2f} of its share", flush=True)
            save(model, head, folder)
    save(model, head, folder)
    for p in named.values():
        p.data = p.data.to(torch.bfloat16).float()
    found = f"right {right(model, tokenizer, 256):.1%}, guessed {guessed(model, head, tokenizer, 64):.1%}"
    print(f"{step} steps, loss {mean:.4f}, {found}", flush=True)


if __name__ == "__main__":
    main()
