"""PEFT adapters: every tensor of one finds its place and every place its tensor, or it is refused before a model is
loaded. That is tried on a model without weights, by peft itself, with the shapes that the adapter's header states.

Knows peft, configs and headers. Nothing of an adapter is executed, and the patterns in it are short.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import AutoModelForCausalLM

from ollm.errors import MissingExtraError, ModelDirectoryError
from ollm.io import strict_json
from ollm.io.ledger import ledger
from ollm.seam import sizes
from ollm.seam.refusing import refusing
from ollm.weights.checkpoint import Checkpoint
from ollm.weights.shards import StoredTensor, brief, read_shard

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MOST_CONFIG_BYTES = 4 * 2**20
_PREFIX = "base_model.model."
_OWN_NAME = "default"
_STREAMED_INITS = (None, True, False, "gaussian")
"""Ways to begin training that leave the base model alone; all others change it when the adapter is loaded, too."""
_SHARED = ("vblora_vector_bank", ".tinylora_v.", ".unilora_theta_d.")
"""Parts of names of parameters that peft sets by itself, from one that is in the file."""
_UNUSED = ("layer_replication", "megatron_config")
"""Options that make another model of it, or import modules by name."""
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
_WRAPPINGS = ("base_layer", "token_adapter", "original_module", "modules_to_save")
"""What peft puts between a module of the model and its own weight."""
_SIZES = re.compile(r"(^|_)r$|rank|block", re.IGNORECASE)
_USUAL_SIZE = 4096
_USUAL_NAMES = 30
_MOST_PATTERN = 1000
_MOST_REPEATS = 4
_MOST_GROUPS = 8


@attrs.frozen(eq=False)
class Adapter:
    """An adapter that fits a model."""

    path: Path
    config: Any
    """peft's."""
    tensors: dict[str, StoredTensor]
    rows: int | None
    """How many embeddings the model has with it; `None` for as many as without."""
    whole: str
    """Why the model's layers cannot be streamed with it; empty if they can."""


def read_adapter(path: Path, config: Any, checkpoint: Checkpoint) -> Adapter:
    """The PEFT checkpoint in a directory, for a model. Optimizer states and other files beside it are ignored.

    Args:
        path: of the adapter.
        config, checkpoint: of the model.

    Raises:
        MissingExtraError: when peft is not installed.
        ModelDirectoryError: when the adapter is incomplete, of a kind that is not for decoder layers, or does not fit.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise ModelDirectoryError(f"adapter_dir {path} is not a PEFT checkpoint, missing: {', '.join(missing)}.")
    try:
        import peft  # noqa: F401
    except ImportError:
        raise MissingExtraError("adapter_dir needs PEFT: pip install 'ollm-core[peft]'.") from None
    with refusing(f"peft cannot read the adapter in {path}"):
        settings = _settings(path)
        tensors = read_shard(path / WEIGHTS)
        _check_numbers(path, settings, tensors)
        for option in _PATTERNS:
            _check_patterns(path, option, settings.get(option), len(tensors))
        for tensor in tensors.values():
            tensor.check()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that a newer peft has: as peft does, they are left out
            peft_config = _config_class(path, settings).from_pretrained(str(path))
    with refusing(f"The adapter in {path} does not fit this model"):
        trial = _Trial(config, checkpoint, tensors)
        trial.inject(peft_config)
    if trial.wrong:
        raise ModelDirectoryError(
            f"The adapter in {path} does not fit this model: {'; '.join(trial.wrong[:4])}"
            f"{' …' if len(trial.wrong) > 4 else ''}. Was it trained for another model, or its config changed?"
        )
    return Adapter(path, peft_config, tensors, trial.rows, _why_whole(peft_config, tensors))


def apply_adapter(model: Any, adapter: Adapter) -> Any:
    """The model with an adapter that was read for it, as a PEFT model. The model itself is changed.

    Raises:
        ModelDirectoryError: peft cannot load it.
        MemoryLimitError: it does not fit.
    """
    from peft import PeftModel

    nbytes = sum(tensor.nbytes for tensor in adapter.tensors.values())
    ledger.check(f"The adapter in {adapter.path}", 2 * nbytes, model.device)  # as it is in the file, and in its place
    what = f"The adapter in {adapter.path} does not fit this model"
    with refusing(what), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some kinds draw numbers when they are loaded: the same ones each time
        if adapter.rows is not None:
            model.resize_token_embeddings(adapter.rows, mean_resizing=False)
        return PeftModel.from_pretrained(
            model, str(adapter.path), is_trainable=False, config=adapter.config, torch_device=str(model.device)
        ).eval()


def _settings(path: Path) -> dict[str, Any]:
    with (path / CONFIG).open("rb") as file:
        raw = file.read(_MOST_CONFIG_BYTES + 1)
    settings = strict_json.parse(raw, most_bytes=_MOST_CONFIG_BYTES, most_values=strict_json.MOST_VALUES)
    if not isinstance(settings, dict):
        raise ModelDirectoryError(f"{path / CONFIG} is not a JSON object.")
    return settings


def _config_class(path: Path, settings: Mapping[str, Any]) -> Any:
    """peft's, of a kind that changes what layers compute."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind, task = settings.get("peft_type"), settings.get("task_type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if config_class is None:
        raise ModelDirectoryError(
            f"{path / CONFIG} is of the kind {brief(kind)}, which the installed peft does not have. Try a newer one."
        )
    if kind in ("ADAPTION_PROMPT", "XLORA") or config_class.is_prompt_learning.fget(config_class.__new__(config_class)):
        raise ModelDirectoryError(
            f"{path / CONFIG} is of the kind {kind}, which adds to the prompt or to keys and values, or chooses among "
            "adapters: ollm takes kinds that change what layers compute, as LORA does."
        )
    if task not in (None, "CAUSAL_LM"):
        raise ModelDirectoryError(f"{path / CONFIG} is for the task {brief(task)}; ollm takes adapters for CAUSAL_LM.")
    if not isinstance(settings.get("init_lora_weights"), (bool, str, type(None))):
        raise ModelDirectoryError(f"{path / CONFIG} sets init_lora_weights={brief(settings['init_lora_weights'])}.")
    for option in _UNUSED:
        if settings.get(option):
            raise ModelDirectoryError(f"{path / CONFIG} sets {option}, which ollm does not take.")
    return config_class


def _check_patterns(path: Path, option: str, value: Any, tensors: int) -> None:
    """Regular expressions of others may run for years. Those in use are names, or a few of them with `.*` between."""
    patterns = [value] if isinstance(value, str) else list(value) if isinstance(value, (list, dict)) else []
    if len(patterns) > tensors + _USUAL_NAMES:
        raise ModelDirectoryError(
            f"{option} in {path / CONFIG} holds {len(patterns)} names, and the adapter {tensors} tensors."
        )
    for pattern in patterns:
        if not isinstance(pattern, str) or not _is_quick(pattern):
            raise ModelDirectoryError(
                f"{option} in {path / CONFIG} holds {brief(pattern)}. ollm takes names of modules, and regular "
                f"expressions of at most {_MOST_PATTERN} characters with at most {_MOST_REPEATS} repetitions of single "
                "characters, and groups of names to choose from."
            )


def _check_numbers(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """What is to be made in a size that no tensor of the adapter has would take memory for nothing."""
    most = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for name, value in settings.items():
        numbers = value.values() if isinstance(value, dict) else [value]
        if _SIZES.search(name) and any(
            isinstance(number, int) and number > max(most, _USUAL_SIZE) for number in numbers
        ):
            raise ModelDirectoryError(f"{path / CONFIG} says {name}={brief(value)}, and its largest tensor has {most}.")


def _is_quick(pattern: str) -> bool:
    if len(pattern) > _MOST_PATTERN or re.search(r"\\\d", pattern):
        return False
    # with one letter for what stands for one character, and for a group of names to choose from
    rest = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern).replace("(?:", "(")
    if rest.count("(") > _MOST_GROUPS or "(?" in rest or re.search(r"\)[*+?{]", rest):
        return False
    for _ in range(_MOST_GROUPS):
        rest = re.sub(r"\([\w-]*(?:\|[\w-]*)*\)", "x", rest)
    repeats = [len(re.findall(r"[*+?{]\??", choice)) for choice in rest.split("|")]
    return max(repeats) <= _MOST_REPEATS and not re.search(r"\([^()]*\|", rest)


def _why_whole(config: Any, tensors: Iterable[str]) -> str:
    """Whether peft reads or changes the weights of decoder layers, which must be there for good then."""
    if config.peft_type != "LORA":
        return f"adapters of the kind {getattr(config.peft_type, 'value', config.peft_type)} may change them"
    if config.init_lora_weights not in _STREAMED_INITS:
        return f"its adapter began with {brief(config.init_lora_weights)}, which changes them"
    if config.use_dora:
        return "its adapter has use_dora=True, for which their norms are taken when it is loaded"
    if config.bias != "none":
        return f"its adapter has bias={config.bias!r}, which changes them"
    if getattr(config, "target_parameters", None):
        return "its adapter is for single parameters"
    saved = [name for name in tensors for module in config.modules_to_save or () if f".{module}." in name]
    return "its adapter replaces modules of them" if any(re.search(r"\.\d+\.", name) for name in saved) else ""


class _Trial:
    """A model without weights, into which peft puts an adapter without weights."""

    def __init__(self, config: Any, checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor]) -> None:
        self.wrong: list[str] = []
        """What does not fit, in words."""
        self.rows: int | None = None
        self._tensors = tensors
        with sizes.no_more_modules_than_tensors(checkpoint), torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config))
            names = {id(module): name for name, module in self._model.named_modules()}
            ends = self._model.get_input_embeddings(), self._model.get_output_embeddings()
            self._embeddings = {names[id(end)]: end for end in ends if id(end) in names}
            self._resize()
            self._base = set(self._model.state_dict())
        if len(tensors) > 16 * len(names):
            raise ModelDirectoryError(f"it has {len(tensors)} tensors, and the model {len(names)} modules")

    def _resize(self) -> None:
        """Have as many embeddings as the adapter, which holds all of them where training made them more."""
        ends = {f"{name}.weight" for name in self._embeddings}
        stored = {
            tensor.shape[0] for name, tensor in self._tensors.items() if _base_name(name) in ends and tensor.shape
        }
        now = self._model.get_input_embeddings().weight.shape[0]
        if len(stored) == 1 and stored != {now}:
            (self.rows,) = stored
            self._model.resize_token_embeddings(self.rows, mean_resizing=False)

    def inject(self, peft_config: Any) -> None:
        """Let peft put the adapter in and load it, and note what does not fit."""
        from peft import PeftModelForCausalLM, get_peft_model_state_dict
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
        from peft.utils import set_peft_model_state_dict

        settings = _without_init(peft_config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuned = PeftModelForCausalLM(self._model, settings, _OWN_NAME, low_cpu_mem_usage=True)
            stated = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                for name, tensor in self._tensors.items()
            }
            result = set_peft_model_state_dict(tuned, stated, _OWN_NAME)
            own = get_peft_model_state_dict(tuned, adapter_name=_OWN_NAME, save_embedding_layers=False)
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(peft_config.peft_type, "")
        missing = [
            name
            for name in result.missing_keys
            if prefix in name and _OWN_NAME in name and not any(part in name for part in _SHARED)
        ]
        missing += [name for name in own if name.endswith("bias") and name not in self._tensors]
        there = set(map(_base_name, self._tensors))
        missing += [f"{name}.weight" for name in self._grown() if f"{name}.weight" not in there]
        # of what is replaced as a whole and has grown, peft writes a copy that it does not read
        unexpected = [
            name
            for name in result.unexpected_keys
            if _PREFIX + _base_name(name) not in self._tensors or ".modules_to_save." not in name
        ]
        self.wrong += [f"{brief(name)} is in its config, and not in its file" for name in sorted(missing)]
        self.wrong += [f"{brief(name)} is in its file, and has no place" for name in sorted(unexpected)]
        self.wrong += [f"{brief(name)} would overwrite the model's own" for name in self._overwritten(peft_config)]

    def _grown(self) -> Iterator[str]:
        """Embeddings of which some would hold random numbers."""
        tied = self._model.all_tied_weights_keys
        return (name for name in self._embeddings if self.rows is not None and f"{name}.weight" not in tied)

    def _overwritten(self, config: Any) -> list[str]:
        """Tensors that are the model's own, and that the config does not speak of."""
        saved = [f".{module}." for module in getattr(config, "modules_to_save", None) or ()]
        targets = getattr(config, "target_modules", None) or ()
        with_bias = getattr(config, "bias", "none") != "none"
        found = []
        for name in sorted(self._tensors):
            base = _base_name(name)
            module = base.rpartition(".")[0]
            spoken_of = (
                any(part in f".{base}" for part in saved)
                or (with_bias and base.endswith("bias"))
                or (module in self._embeddings and (self.rows is not None or module.rpartition(".")[2] in targets))
            )
            if base in self._base and not spoken_of:
                found.append(name)
        return found


def _base_name(name: str) -> str:
    """What a tensor of an adapter would be called in the model without it, if it is there."""
    return ".".join(part for part in name.removeprefix(_PREFIX).split(".") if part not in _WRAPPINGS)


def _without_init(peft_config: Any) -> Any:
    """Another config object, which begins with weights that nobody computes."""
    settings = copy.deepcopy(peft_config)
    if hasattr(settings, "init_lora_weights"):
        settings.init_lora_weights = False
    return settings
