"""Sizes of a policy, and the names and shapes of its tensors in openpi's `model.safetensors`."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from openpi_duquant.config import ACTION_EXPERT
from openpi_duquant.config import LANGUAGE_MODEL
from openpi_duquant.config import DuQuantError

IMAGE_SIZE = 224
PATCH_SIZE = 14
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
VISION_HEAD_DIM = 72  # of SigLIP So400m; the number of heads follows from the width
PALIGEMMA = "paligemma_with_expert.paligemma."
VISION_MODEL = PALIGEMMA + "model.vision_tower.vision_model."
PROJECTOR = PALIGEMMA + "model.multi_modal_projector.linear"
EMBEDDING = PALIGEMMA + "lm_head"  # tied: openpi writes the token embedding under this name only
EXPERT_LM_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"  # never called

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class TransformerSize:
    """width, layers, width of the MLP, attention heads and their width."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a pi0 or pi0.5 policy. Attention has one key/value head for all query heads, in both Gemmas.

    Attributes:
        vision: SigLIP.
        language: Gemma, the language model.
        expert: Gemma, the action expert; with adaRMS in pi0.5.
        vocab_size: Rows of the token embedding.
        action_dim: Width of an action and of the state (padded, 32 in released checkpoints).
        pi05: pi0.5, which modulates the expert by the time step; pi0 puts time and state into its input.
    """

    vision: TransformerSize
    language: TransformerSize
    expert: TransformerSize
    vocab_size: int
    action_dim: int
    pi05: bool = True

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Architecture":
        """The inverse of `dataclasses.asdict`."""
        sizes = {name: TransformerSize(**values[name]) for name in ("vision", "language", "expert")}
        return cls(**values | sizes)

    @classmethod
    def infer(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Architecture":
        """The architecture of a checkpoint with these tensors, all of them checked.

        Raises:
            DuQuantError: If they are not those of a pi0 or pi0.5 checkpoint of openpi; names the first that differs.
        """
        found = cls._read(shapes)
        pair = [(size.depth, size.num_heads, size.head_dim) for size in (found.language, found.expert)]
        if pair[0] != pair[1] or found.vision.width % VISION_HEAD_DIM:
            raise DuQuantError(
                "not a pi0 or pi0.5 checkpoint of openpi: layers, heads and head width of the language model "
                f"{pair[0]} and of the action expert {pair[1]} must be equal, the vision width {found.vision.width} "
                f"a multiple of {VISION_HEAD_DIM}"
            )
        expected = parameter_shapes(found)
        for name in sorted(set(expected) | (set(shapes) - {EXPERT_LM_HEAD})):
            if expected.get(name) != shapes.get(name):
                raise DuQuantError(
                    f"not a pi0 or pi0.5 checkpoint of openpi: tensor {name} is {shapes.get(name, 'missing')}, "
                    f"expected {expected.get(name, 'no such tensor')}"
                )
        return found

    @classmethod
    def _read(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Architecture":
        fc1, width = _matrix(shapes, VISION_MODEL + "encoder.layers.0.mlp.fc1.weight")
        depth = _count(shapes, VISION_MODEL + "encoder.layers.{}.mlp.fc1.weight")
        return cls(
            vision=TransformerSize(width, depth, fc1, max(1, width // VISION_HEAD_DIM), VISION_HEAD_DIM),
            language=_gemma_size(shapes, LANGUAGE_MODEL),
            expert=_gemma_size(shapes, ACTION_EXPERT),
            vocab_size=_matrix(shapes, EMBEDDING + ".weight")[0],
            action_dim=_matrix(shapes, "action_out_proj.weight")[0],
            pi05="action_time_mlp_in.weight" not in shapes,
        )


PI05 = Architecture(
    vision=TransformerSize(1152, 27, 4304, 16, 72),
    language=TransformerSize(2048, 18, 16384, 8, 256),
    expert=TransformerSize(1024, 18, 4096, 8, 256),
    vocab_size=257152,
    action_dim=32,
)
"""The released pi0.5; pi0 differs in `pi05` alone."""

SMALL = Architecture(
    vision=TransformerSize(144, 2, 272, 2, 72),
    language=TransformerSize(256, 4, 1024, 4, 64),
    expert=TransformerSize(128, 4, 512, 4, 64),
    vocab_size=2048,
    action_dim=32,
)
"""A pi0.5 that converts and runs in seconds on a laptop, for tests and the demo."""


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None or len(shape) != 2 or 0 in shape:
        raise DuQuantError(
            f"not a pi0 or pi0.5 checkpoint of openpi: tensor {name} is {shape or 'missing'}, expected a matrix"
        )
    return shape[0], shape[1]


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    """Layers whose tensor, named by the pattern, is there."""
    depth = 0
    while pattern.format(depth) in shapes:
        depth += 1
    return depth


def _gemma_size(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> TransformerSize:
    mlp_dim, width = _matrix(shapes, prefix + "layers.0.mlp.gate_proj.weight")
    head_dim, _ = _matrix(shapes, prefix + "layers.0.self_attn.k_proj.weight")
    heads = _matrix(shapes, prefix + "layers.0.self_attn.q_proj.weight")[0] // head_dim
    return TransformerSize(width, _count(shapes, prefix + "layers.{}.mlp.gate_proj.weight"), mlp_dim, heads, head_dim)


def parameter_shapes(architecture: Architecture) -> Shapes:
    """Names and shapes of the tensors of openpi's `model.safetensors`, but for the expert's unused lm_head."""
    vision, language, expert = architecture.vision, architecture.language, architecture.expert
    shapes = {
        EMBEDDING + ".weight": (architecture.vocab_size, language.width),
        LANGUAGE_MODEL + "norm.weight": (language.width,),
        VISION_MODEL + "embeddings.patch_embedding.weight": (vision.width, 3, PATCH_SIZE, PATCH_SIZE),
        VISION_MODEL + "embeddings.patch_embedding.bias": (vision.width,),
        VISION_MODEL + "embeddings.position_embedding.weight": (PATCHES, vision.width),
        **_biased(VISION_MODEL + "post_layernorm", vision.width),
        **_biased(PROJECTOR, language.width, vision.width),
        **_norm(ACTION_EXPERT + "norm", expert.width, adaptive=architecture.pi05),
        **_biased("action_in_proj", expert.width, architecture.action_dim),
        **_biased("action_out_proj", architecture.action_dim, expert.width),
    }
    if architecture.pi05:
        shapes |= _biased("time_mlp_in", expert.width, expert.width)
        shapes |= _biased("time_mlp_out", expert.width, expert.width)
    else:
        shapes |= _biased("state_proj", expert.width, architecture.action_dim)
        shapes |= _biased("action_time_mlp_in", expert.width, 2 * expert.width)
        shapes |= _biased("action_time_mlp_out", expert.width, expert.width)
    for index in range(vision.depth):
        shapes |= _siglip_layer(f"{VISION_MODEL}encoder.layers.{index}.", vision)
    for prefix, size in ((LANGUAGE_MODEL, language), (ACTION_EXPERT, expert)):
        for index in range(size.depth):
            adaptive = architecture.pi05 and prefix == ACTION_EXPERT
            shapes |= _gemma_layer(f"{prefix}layers.{index}.", size, adaptive=adaptive)
    return shapes


def _biased(name: str, *shape: int) -> Shapes:
    return {name + ".weight": shape, name + ".bias": shape[:1]}


def _norm(name: str, width: int, *, adaptive: bool) -> Shapes:
    return _biased(f"{name}.dense", 3 * width, width) if adaptive else {f"{name}.weight": (width,)}


def _siglip_layer(prefix: str, size: TransformerSize) -> Shapes:
    shapes = {}
    for norm in ("layer_norm1", "layer_norm2"):
        shapes |= _biased(prefix + norm, size.width)
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= _biased(prefix + "self_attn." + projection, size.width, size.width)
    shapes |= _biased(prefix + "mlp.fc1", size.mlp_dim, size.width)
    return shapes | _biased(prefix + "mlp.fc2", size.width, size.mlp_dim)


def _gemma_layer(prefix: str, size: TransformerSize, *, adaptive: bool) -> Shapes:
    heads = size.num_heads * size.head_dim
    shapes: Shapes = {
        prefix + "self_attn.q_proj.weight": (heads, size.width),
        prefix + "self_attn.k_proj.weight": (size.head_dim, size.width),
        prefix + "self_attn.v_proj.weight": (size.head_dim, size.width),
        prefix + "self_attn.o_proj.weight": (size.width, heads),
        prefix + "mlp.gate_proj.weight": (size.mlp_dim, size.width),
        prefix + "mlp.up_proj.weight": (size.mlp_dim, size.width),
        prefix + "mlp.down_proj.weight": (size.width, size.mlp_dim),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes |= _norm(prefix + norm, size.width, adaptive=adaptive)
    return shapes


def linear_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linear layers among a checkpoint's tensors, by layer name."""
    embeddings = ("position_embedding.weight", "lm_head.weight")
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not name.endswith(embeddings)
    }


def kept_in_float32(name: str) -> bool:
    """Whether openpi computes with this tensor in fp32 when the policy runs in bf16."""
    if not name.startswith("paligemma_with_expert."):
        return True
    parts = ("patch_embedding", "position_embedding", "input_layernorm", "post_attention_layernorm", "model.norm.")
    return any(part in name for part in parts)
