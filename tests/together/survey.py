"""`make survey`: try every causal architecture that transformers has, and write `docs/reference/models.md`.

Each is made tiny from its config class (see `architectures.py`), generates with stock transformers and with a disk
cache, and is listed with the mode that core chose. A model whose tokens differ ends the survey with an error.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ollm import disk_cache
from ollm.errors import ConfigurationError
from ollm.seam.support import check_takes_cache
from together.architectures import make

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
SECONDS_PER_MODEL = 8
HEAD = """# Models

Written by `make survey` with transformers {version}. Every causal architecture that transformers has was made as a
tiny random model from its config class alone, in fp32, and generated 8 tokens from a left-padded batch of two prompts
of 30, with stock transformers and with the strategy `chunked` and nothing resident. **All gave the same tokens.**

*Block*: attention walks the stored blocks. *Tensor*: it gets one layer's keys and values at a time. The mode is not
looked up here: core finds it out by trial for the model at hand, and `cache.state()` says which and why. *Stored*
counts the layers that go to the store, of those of the tiny model.

| architecture | mode | stored | why not blocks |
|---|---|---|---|
"""
TAIL = """
## Without a cache

These take no cache for keys and values from anybody. `disk_cache` refuses them with a `ConfigurationError` before
anything is made; `generate` works without one.

| architecture | why |
|---|---|
{refused}

## Not tried

These cannot be made so small from generic settings, need packages that were not there, or do not run with stock
transformers in that form. That says nothing about whether they work.

{names}
"""


class TooSlow(Exception):
    """A model took longer than it may."""


class Refused(Exception):
    """A model takes no cache."""


def try_model(model_type: str) -> tuple[str, str, str]:
    """Mode, stored layers and reason; raises where the model cannot be made or run by stock transformers, and `Refused`
    with the reason."""
    model = make(model_type)
    try:
        check_takes_cache(model)
    except ConfigurationError as error:
        raise Refused(str(error).partition(": ")[2].partition(". Call")[0]) from error
    ids = torch.randint(3, 101, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(ids, past_key_values=DynamicCache(config=model.config), **settings)
    with tempfile.TemporaryDirectory() as folder, disk_cache(model, cache_dir=folder, ram_budget=0) as cache:
        state = cache.state()
        if not torch.equal(model.generate(ids, past_key_values=cache, **settings), stock):
            sys.exit(f"{model_type}: the tokens differ in {state.mode} mode")
        layers = len(cache.layers)
    reason = "" if state.mode == "block" else state.mode_reason.removeprefix("blocks do not work with this model: ")
    short = " ".join(reason.split()).replace("|", "/").split(". Was the model")[0]
    return state.mode, f"{state.stored_layers} of {layers}", short[:100]


def main() -> None:
    """Survey all and write the page."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)

    def too_slow(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    rows, refused, left = [], [], []
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(SECONDS_PER_MODEL)
        try:
            rows.append((model_type, *try_model(model_type)))
        except Refused as reason:
            refused.append((model_type, str(reason)))
        except Exception:  # whatever stock code does with such settings; the page says so
            left.append(model_type)
        finally:
            signal.alarm(0)
    table = "\n".join(f"| `{name}` | {mode} | {stored} | {why} |" for name, mode, stored, why in rows)
    without = "\n".join(f"| `{name}` | {why} |" for name, why in refused)
    names = ", ".join(f"`{name}`" for name in left)
    tail = TAIL.format(refused=without, names=names)
    PAGE.write_text(HEAD.format(version=transformers.__version__) + table + "\n" + tail)
    print(
        f"{len(rows)} architectures, {sum(row[1] == 'block' for row in rows)} in block mode; "
        f"{len(refused)} refused, {len(left)} not tried"
    )


if __name__ == "__main__":
    main()
