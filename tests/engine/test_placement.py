"""What stays in host memory."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.placement import HostEmbedding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (2, 7)])
def test_embeddings_are_the_rows_of_their_tokens(shape: tuple[int, int], dtype: torch.dtype) -> None:
    embedding = HostEmbedding(11, 6, dtype=dtype)
    tokens = torch.randint(11, shape)
    assert torch.equal(embedding(tokens), F.embedding(tokens, embedding.weight))


def test_the_last_row_is_one() -> None:
    embedding = HostEmbedding(11, 6)
    assert torch.equal(embedding(torch.tensor([[10, 0]])), embedding.weight[[10, 0]][None])


@pytest.mark.parametrize("token", [11, -1])
def test_tokens_without_a_row_are_refused(token: int) -> None:
    with pytest.raises(DuQuantError, match=r"token ids go from -?\d+ to \d+: the policy knows 11"):
        HostEmbedding(11, 6)(torch.tensor([[3, token]]))
