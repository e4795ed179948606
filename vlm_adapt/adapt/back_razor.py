"""Back Razor: forward as ever, and for the backward pass only the largest tenth of every activation.

Jiang et al. 2022, "Back Razor: Memory-Efficient Transfer Learning by Self-Sparsified Backpropagation".
Nothing of it trains: it changes what the layers of a part keep while other methods train there. A linear
layer's dx stays exact and its dW becomes g^T (m * x); products of attention, softmax, activations and norms
compute their gradients with the sparse values. Knows layers by their kind; knows nothing about files.

What is treated, in the blocks that `blocks` names: linear layers, layer and RMS norms, activations, products
of gated feed-forwards, and attention whose scores, softmax and sums are computed one by one: transformers'
`eager`, timm's unfused, and our own on the CPU up to the length whose probabilities it keeps. Not treated:
fused attention (SDPA, FlashAttention, FlexAttention, torch's MultiheadAttention but for its input), which
computes probabilities again from queries and keys and would be wrong altogether with most of them gone; the
loss and the head, which lie outside the blocks; parameters, statistics of norms, masks and rotary angles.

On a CPU set MALLOC_MMAP_THRESHOLD_=131072, or gaps of the allocator take back most of what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.anatomy import anatomies, is_norm
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.sparse_saved import Keeper, Saved
from vlm_adapt.attention import NAME
from vlm_adapt.attention.products import KEPT
from vlm_adapt.attention.texts import TextMask
from vlm_adapt.errors import UserError

ACTIVATIONS = ("gelu", "silu", "relu", "swish", "mish", "sigmoid", "tanh", "activation")
SMALL = 16  # fewer values than a 16th of the layer's input, or one a token, are statistics: kept as they are
INPUTS = ("hidden_states", "x", "query", "key", "value", "key_value_states")  # names of activations


class BackRazor(Method):
    """Sparse activations for the backward pass of a part, whatever trains there.

    Args:
        sparsity: the share of each activation that is dropped, per sample: a picture, a text (each of a
            packed row's for itself, where our own attention or FlashAttention reads it), else a row.

    With gradient checkpointing what Back Razor treats is still kept, sparsely; the rest is computed again.
    """

    name = "back_razor"
    summary = "keeps a tenth of the activations for the backward pass of whatever trains beside it"
    paper = "Jiang et al. 2022, Back Razor, NeurIPS 2022"
    order = 3  # after every layer that others add
    trains = False
    example = {"sparsity": 0.5}  # noqa: RUF012

    def __init__(self, sparsity: float = 0.9):
        super().__init__()
        if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
            raise UserError(f"adapt: back_razor takes a sparsity from 0 to below 1, not {sparsity!r}")
        self.sparsity = float(sparsity)
        self.keeper = Keeper(self.sparsity)
        self._open: list[tuple[nn.Module, Any]] = []
        self._starts: Sequence[int] = ()  # of the texts of the row that the blocks read now

    def attach(self, place: Place) -> None:
        """Listen to the layers that are treated; nothing is replaced."""
        self.part = place.part
        inside = place.inside()
        found: dict[int, nn.Module] = {}
        for _, name, block in place.blocks():
            block.register_forward_pre_hook(self._look, with_kwargs=True)
            for module in block.modules():
                if id(module) in inside and is_treated(module):
                    found[id(module)] = module
            for _, places in anatomies(block, name):
                for part in (places.attention, places.cross_attention, places.mlp):
                    if part is not None and next(part.children(), None) is not None:
                        found[id(part)] = part
        if not found:
            raise UserError(f"adapt: back_razor finds no layer in '{place.where}' that it treats")
        for module in found.values():
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
            module.register_forward_hook(self._leave, always_call=True)

    def _look(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find where the texts of a row lie: only a block is told."""
        self._starts = starts_of((*args, *kwargs.values()), kwargs)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active or not torch.is_grad_enabled():
            return
        call = Call(self.keeper, module, args, kwargs, self._starts)
        hooks = torch.autograd.graph.saved_tensors_hooks(call.pack, unpack)
        hooks.__enter__()
        self._open.append((module, hooks))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open and self._open[-1][0] is module:
            self._open.pop()[1].__exit__()


class Call:
    """One call of a treated layer: which of the tensors saved in it are kept sparsely.

    Args:
        keeper: keeps them.
        module: the layer, called with `args` and `kwargs`.
        starts: where the texts of a row begin, if it holds several.
    """

    def __init__(
        self,
        keeper: Keeper,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        starts: Sequence[int] = (),
    ):
        self.keeper, self.module, self.starts = keeper, module, starts
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.size = first.numel() if first is not None else 0
        self.samples = len(first) if first is not None and first.ndim else 1
        # Asked here: while autocast runs an operation, it says that it is off.
        self.autocast = first is not None and torch.is_autocast_enabled(first.device.type)
        self.only: set[int] | None = None  # storages that alone are kept sparsely
        self.never: set[int] = set()  # of what the layer is told and does not compute: masks, angles
        given = {f"{place}": value for place, value in enumerate(args)} | kwargs
        told = [value for name, value in given.items() if name not in ("0", *INPUTS)]
        self.never = {storage_of(tensor) for value in told for tensor in tensors_in(value)}
        kind = attention_kind(module, first, kwargs)
        if kind == "fused":
            self.only = {storage_of(first)} if first is not None else set()
            self.never = set()
        elif kind == "by text":
            self.samples = 1  # heads come first there, and texts one after another
            if not starts and first is not None:
                self.starts = [row * first.shape[1] for row in range(len(first) + 1)]

    def pack(self, tensor: Tensor) -> Tensor | Saved:
        """Called by autograd for each tensor that it saves."""
        if not tensor.is_floating_point() or type(tensor) is not Tensor or not tensor.numel():
            return tensor
        storage = storage_of(tensor)
        if self.only is not None and storage not in self.only:
            return tensor
        small = tensor.numel() * SMALL < self.size or tensor.shape[-1] == 1
        if small or storage in self.never or self._is_weight(tensor, storage):
            return tensor
        return self.keeper.keep(tensor, self.samples, self.starts)

    def _is_weight(self, tensor: Tensor, storage: int) -> bool:
        """Whether it is a parameter of the layer, or autocast's copy of one."""
        own = list(self.module.parameters())
        if any(storage_of(parameter) == storage for parameter in own):
            return True
        if not self.autocast:
            return False
        shape = sorted(tensor.shape)
        same = [p for p in own if p.ndim == tensor.ndim and sorted(p.shape) == shape]
        return any(_equal(tensor, parameter) for parameter in same)


def _equal(tensor: Tensor, parameter: Tensor) -> bool:
    values = parameter.detach().to(tensor.dtype)
    return any(v.shape == tensor.shape and torch.equal(v, tensor) for v in (values, values.mT))


def unpack(saved: Tensor | Saved) -> Tensor:
    """Called by autograd when the backward pass wants it."""
    return saved.tensor() if isinstance(saved, Saved) else saved


def is_treated(module: nn.Module) -> bool:
    """Whether a module is a linear layer, a norm over channels, or an activation."""
    name = type(module).__name__
    if isinstance(module, nn.Linear) or name == "Conv1D":
        return True
    if is_norm(module) and not isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return True
    plain = next(module.children(), None) is None and next(module.parameters(), None) is None
    return plain and any(word in name.lower() for word in ACTIVATIONS)


def attention_kind(module: nn.Module, first: Tensor | None, kwargs: dict[str, Any]) -> str:
    """How attention computes: `separate` products, `by text` (ours), `fused`; "" where it is none."""
    if isinstance(module, nn.MultiheadAttention):
        return "fused"
    config = getattr(module, "config", None)
    chosen = getattr(config, "_attn_implementation", None) if hasattr(module, "is_causal") else None
    if chosen is None and not hasattr(module, "fused_attn"):
        words = ("attention", "attn")
        named = any(word in type(module).__name__.lower() for word in words)
        return "fused" if named and not is_norm(module) else ""
    if hasattr(module, "fused_attn"):
        return "fused" if module.fused_attn else "separate"
    if chosen == "eager":
        return "separate"
    if chosen != NAME or first is None or first.device.type != "cpu":
        return "fused"
    if module.training and any(getattr(config, n, None) for n in ("attention_dropout", "attn_pdrop")):
        return "fused"  # the factors of dropout are saved too
    mask = kwargs.get("attention_mask")
    if type(mask) is Tensor:
        return "separate"
    longest = getattr(mask, "longest", first.shape[1])
    return "by text" if longest <= KEPT else "fused"


def starts_of(values: Sequence[Any], names: dict[str, Any]) -> list[int]:
    """Where the texts of a row begin, and their end: of our own mask, or as FlashAttention is told."""
    mask = next((value for value in values if isinstance(value, TextMask)), None)
    if mask is not None:
        return list(mask.starts)
    told = names.get("cu_seq_lens_q")
    return told.tolist() if isinstance(told, Tensor) else []


def storage_of(tensor: Tensor) -> int:
    """A number that tensors which share memory have in common; 0 for tensors without any."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):  # a mask that is computed when it is read has none
        return 0


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an argument, of tuples and lists too."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for one in value for tensor in tensors_in(one)]
    return []
