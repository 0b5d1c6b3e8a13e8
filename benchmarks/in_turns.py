"""Two versions of ollm, measured in turns on one machine: is the second one slower?

Disks and shared machines drift by a third within minutes, so figures of different runs tell little. Here each round
runs the same script once with each of two Pythons, which have a version of ollm each, in turns; the medians of the
ratios of the pairs are printed. The script uses what both have: `disk_cache`, `AutoInference` and transformers.

    python benchmarks/in_turns.py BEFORE/.venv/bin/python AFTER/.venv/bin/python [rounds] [case …]

Cases: kv (32,768 tokens; nothing, half and everything resident), long (131,072 tokens, nothing resident, inside 2 GB
where root may make a memory cgroup), weights (a 2 GB Llama, every layer streamed; and with 32,768 tokens on disk, too).
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, KV_HEADS, SIZE, HIDDEN, PIECE = 16, 8, 128, 1024, 4096
CASES = ("kv", "long", "weights")
LIMIT = 2 * 10**9
_CGROUPS = Path("/sys/fs/cgroup")


def llama(hidden: int, layers: int, intermediate: int, vocabulary: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=2 * KV_HEADS,
        num_key_value_heads=KV_HEADS, head_dim=SIZE, vocab_size=vocabulary, max_position_embeddings=2**18,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


def random_model(config):
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def fill(cache, layers: int, tokens: int) -> float:
    """Seconds that storing so many tokens took, and the disk's work behind it."""
    import torch

    keys, values = (torch.randn(1, KV_HEADS, PIECE, SIZE, dtype=torch.bfloat16) for _ in range(2))
    began = time.perf_counter()
    for _ in range(0, tokens, PIECE):
        for layer in range(layers):
            cache.update(keys, values, layer)
    for path in cache.state().directory.rglob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def steps(model, cache, count: int) -> float:
    """The median of so many steps of one token, two more of which are run before."""
    import torch

    seconds = []
    for _ in range(count + 2):
        mask = None if cache is None else torch.ones(1, int(cache.get_seq_length()) + 1, dtype=torch.long)
        began = time.perf_counter()
        model(torch.tensor([[7]]), attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def measure(case: str, folder: str) -> dict[str, float]:
    import torch

    from ollm import AutoInference, disk_cache

    found: dict[str, float] = {}
    with torch.inference_mode():
        if case == "weights":
            o = AutoInference(folder, device="cpu", logging=False)
            o.offload_layers_to_cpu(0, policy="prefix")
            found["weights streamed"] = steps(o.model, None, 5)
            with o.DiskCache(folder, ram_budget=0) as cache:
                fill(cache, o.model.config.num_hidden_layers, 32768)
                found["weights streamed, 32k tokens on disk"] = steps(o.model, cache, 5)
            return found
        tokens, count = (131072, 3) if case == "long" else (32768, 9)
        model = random_model(llama(HIDDEN, LAYERS, 2816, 4096))
        everything = tokens * LAYERS * KV_HEADS * SIZE * 2 * 2
        budgets = (
            {"nothing": 0} if case == "long" else {"nothing": 0, "half": everything // 2, "everything": 2 * everything}
        )
        for name, budget in budgets.items():
            with disk_cache(model, cache_dir=folder, ram_budget=budget) as cache:
                stored = fill(cache, LAYERS, tokens)
                if not budget:
                    found[f"storing {tokens:,} tokens"] = stored
                found[f"a step, {tokens:,} tokens, {name} resident"] = steps(model, cache, count)
    return found


def prepare(folder: Path) -> None:
    """The checkpoint whose layers are streamed, once."""
    import torch

    config = llama(2048, 16, 8192, 32000)
    config.dtype = torch.bfloat16
    random_model(config).save_pretrained(folder, max_shard_size="500MB")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(folder)


@contextlib.contextmanager
def limited(case: str):
    """A cgroup for the case `long`; `None` where there is none to be had."""
    parents = [(_CGROUPS / "memory", "memory.limit_in_bytes"), (_CGROUPS, "memory.max")]
    for parent, name in parents if case == "long" else ():
        group = parent / f"ollm-in-turns-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            (group / name).write_text(str(LIMIT))
            try:
                yield group
            finally:
                with contextlib.suppress(OSError):
                    group.rmdir()
            return
    yield None


def run(python: str, case: str, folder: Path) -> dict[str, float]:
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("1")
    with limited(case) as group:
        command = [python, __file__, "--measure", case, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            if group is not None:
                (group / "cgroup.procs").write_text(str(child.pid))
            out, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"{command} ended with {child.returncode}")
    return json.loads(out.splitlines()[-1])


def main(before: str, after: str, rounds: int, cases: list[str]) -> None:
    pairs: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        if "weights" in cases:
            subprocess.run([after, __file__, "--prepare", str(folder)], check=True)
        for number in range(rounds):
            for case in cases:
                order = (before, after) if number % 2 == 0 else (after, before)
                results = {python: run(python, case, folder) for python in order}
                for what, seconds in results[before].items():
                    pairs.setdefault(what, []).append((seconds, results[after][what]))
                    print(f"round {number + 1}: {what}: {seconds:.3f} s, then {results[after][what]:.3f} s", flush=True)
    print(f"\nmedians of {rounds} rounds                             before    after   after / before, each round")
    for what, found in pairs.items():
        first, second = (statistics.median(pair[place] for pair in found) for place in (0, 1))
        ratios = [pair[1] / pair[0] for pair in found]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{what:44} {first:8.3f} {second:8.3f}   {statistics.median(ratios):.2f} ({shown})")


if __name__ == "__main__":
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    elif sys.argv[1] == "--prepare":
        prepare(Path(sys.argv[2]))
    else:
        chosen = sys.argv[4:] or list(CASES)
        main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 3, chosen)
