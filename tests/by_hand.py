"""The conversion of a decoder layer, done by hand in numpy and fp64: what the files of a conversion must stand for."""

from collections.abc import Iterable
import itertools
import math
import pathlib

import numpy as np
from safetensors.torch import load_file
import torch

from openpi_duquant import DuQuantConfig

Array = np.ndarray
LANGUAGE = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
GROUPS = (("self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


def arrays(folder: pathlib.Path) -> dict[str, Array]:
    """The tensors of a checkpoint; floating point as fp64."""
    tensors = load_file(folder / "model.safetensors")
    return {name: (t.double() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}


def decoded(tensors: dict[str, Array], layer: str) -> tuple[Array, Array]:
    """Codes [N, K] of int4 weights, even k in the low nibble, and their scales [N, 1]."""
    packed = tensors[layer + ".weight_packed"]
    nibbles = np.stack((packed % 16, packed // 16), axis=-1).reshape(len(packed), -1).astype(int)
    return nibbles - 16 * (nibbles > 7), tensors[layer + ".weight_scale"]


def snake(weight: Array, block: int) -> list[int]:
    """Input channels dealt to blocks one by one, strongest first, the direction turning after every round."""
    energy = (weight**2).sum(0)
    hands: list[list[int]] = [[] for _ in range(weight.shape[1] // block)]
    for rank, channel in enumerate(sorted(range(len(energy)), key=lambda k: -energy[k])):
        turn, place = divmod(rank, len(hands))
        hands[place if turn % 2 == 0 else len(hands) - 1 - place].append(channel)
    return list(itertools.chain(*hands))


def hadamard(width: int, block: int) -> Array:
    """Sylvester's matrix, normalised, on the diagonal."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return np.kron(np.eye(width // block), matrix / math.sqrt(block))


def diagonal(blocks: Iterable[Array]) -> Array:
    """Matrices on the diagonal of a larger one."""
    return torch.block_diag(*map(torch.from_numpy, blocks)).numpy()


def dual(matrix: Array) -> Array:
    """The inverse transpose."""
    return torch.linalg.inv(torch.from_numpy(matrix)).T.numpy()


def singular(weight: Array, block: int) -> Array:
    """Right singular vectors of every block of columns, on the diagonal; their largest component is positive."""
    blocks = []
    for begin in range(0, weight.shape[1], block):
        part = torch.from_numpy(weight[:, begin : begin + block].copy())
        vectors = torch.linalg.svd(part, full_matrices=False).Vh.T.numpy()
        blocks.append(vectors * np.sign(vectors[abs(vectors).argmax(0), range(block)]))
    return diagonal(blocks)


def rounded(matrix: Array) -> Array:
    """Rounded to bf16."""
    return torch.from_numpy(matrix).bfloat16().double().numpy()


def folded(source: dict[str, Array], config: DuQuantConfig, index: int) -> dict[str, Array]:
    """What the folds of the preset make of a decoder layer's tensors, in both Gemmas; without the name's `.weight`."""
    both = [f"{model}layers.{index}." for model in (LANGUAGE, EXPERT)]
    prefixes = [prefix for prefix in both if prefix.startswith(config.scope)]
    weights = {name.removesuffix(".weight"): array for name, array in source.items() if name.startswith(tuple(both))}
    for prefix in prefixes:
        for norm, members in zip(("input_layernorm", "post_attention_layernorm"), GROUPS):
            if config.rotation == "hadamard" and prefix + norm in weights:
                gain = 1 + weights[prefix + norm]
                columns = np.concatenate([weights[prefix + member] * gain for member in members])
                root = (columns**2).sum(0) ** 0.25
                weights[prefix + norm] = rounded(root / np.exp(np.log(root).mean()) - 1)
                for member in members:
                    weights[prefix + member] = weights[prefix + member] * gain / (1 + weights[prefix + norm])
        if config.permute:
            down = weights[prefix + "mlp.down_proj"]
            order = snake(down, math.gcd(config.rotation_block, down.shape[1]))
            weights[prefix + "mlp.down_proj"] = down[:, order]
            for member in GROUPS[1]:
                weights[prefix + member] = weights[prefix + member][order]
    if config.permute:
        width = len(weights[both[0] + "self_attn.v_proj"])
        heads = np.concatenate([weights[prefix + "self_attn.o_proj"].reshape(-1, width) for prefix in prefixes])
        block = math.gcd(config.rotation_block, width)
        order = snake(heads, block)
        rotation = (
            hadamard(width, block) if config.rotation == "hadamard" else rounded(singular(heads[:, order], block))
        )
        for prefix in both:
            value, output = prefix + "self_attn.v_proj", prefix + "self_attn.o_proj"
            weights[value] = rotation.T @ weights[value][order]
            by_head = weights[output].reshape(-1, width)[:, order] @ dual(rotation)
            weights[output] = by_head.reshape(weights[output].shape)
    return weights


def transformed(
    tensors: dict[str, Array], weights: dict[str, Array], members: list[str], config: DuQuantConfig
) -> dict[str, Array]:
    """The weights of a group under what the file stores for the run time, which is checked on the way."""
    stacked = np.concatenate([weights[member] for member in members])
    block = math.gcd(config.rotation_block, stacked.shape[1])
    shared = {kind: [m for m in members if f"{m}.{kind}" in tensors] for kind in ("permutation", "rotation")}
    at_run_time = not members[0].endswith("o_proj")
    assert len(shared["permutation"]) == (config.permute and at_run_time and not members[0].endswith("down_proj"))
    assert len(shared["rotation"]) == (config.rotation == "svd" and at_run_time)
    if shared["permutation"]:
        permutation = tensors[shared["permutation"][0] + ".permutation"]
        assert permutation.tolist() == snake(stacked, block)
        stacked = stacked[:, permutation]
    if shared["rotation"]:
        rotation = diagonal(tensors[shared["rotation"][0] + ".rotation"])
        assert np.allclose(rotation, singular(stacked, block), rtol=0, atol=2**-8)  # bf16
        stacked = stacked @ dual(rotation)
    elif config.rotation == "hadamard" and at_run_time:
        stacked = stacked @ hadamard(stacked.shape[1], block)
    ends = np.cumsum([len(weights[member]) for member in members])
    parts = dict(zip(members, np.split(stacked, ends[:-1])))
    for member in members if config.row_rotation == "restore" else ():
        restore = diagonal(tensors[member + ".output_rotation"])
        rows = singular(parts[member].T, math.gcd(config.rotation_block, len(parts[member])))
        assert np.allclose(restore, rows.T, rtol=0, atol=2**-8)
        parts[member] = dual(restore) @ parts[member]  # y = y' restore
    return parts
