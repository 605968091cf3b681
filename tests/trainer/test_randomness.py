"""Every stream has its own key, and its values never change: runs resume with them."""

import itertools

import numpy as np
import pytest
import torch

from trainer import randomness
from trainer.data.loader import batch_indices
from trainer.randomness import (
    CROPS,
    DROPOUT,
    NOISE,
    ORDER,
    STEP,
    WEIGHTS,
    dropout_counter,
    mixed,
)


def test_the_first_values_of_every_stream_are_those_of_the_first_release() -> None:
    """Computed with the code of the first release."""
    assert mixed(0, 0, 0) == 0xE220A8397B1DCDAF  # splitmix64's first output for seed 0
    assert [mixed(3, purpose, 7) for purpose in range(3)] == [
        STEP.key(3, 7),
        NOISE.key(3, 7),
        DROPOUT.key(3, 7),
    ]
    assert WEIGHTS.key(5, 0) == 5
    expected = np.random.Generator(np.random.Philox(key=[3, 2])).permutation(10)
    assert ORDER.generator(3, 2).permutation(10).tolist() == expected.tolist()
    key = np.array([3, 2**63 + 2], np.uint64)
    crops = np.random.Generator(np.random.Philox(key=key)).random(4)
    assert CROPS.generator(3, 2).random(4).tolist() == crops.tolist()
    for stream, number in ((randomness.CLASSIFIER_BATCHES, 0), (randomness.MEASURED, 1)):
        fixed = np.random.Generator(np.random.Philox(key=[0, number])).permutation(9)
        assert stream.generator(8).permutation(9).tolist() == fixed.tolist()
    assert randomness.CLASSIFIER_WEIGHTS.key(8, 0) == 0
    assert randomness.WORKERS.key(8, 0) == torch.Generator().initial_seed()


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_no_two_streams_of_a_run_share_a_key(seed: int) -> None:
    counters = range(50)
    torch_keys = [stream.key(seed, n) for stream in (STEP, NOISE, DROPOUT) for n in counters]
    assert len({*torch_keys, WEIGHTS.key(seed, 0)}) == len(torch_keys) + 1
    numpy_keys = [stream.key(seed, n) for stream in (ORDER, CROPS) for n in counters]
    assert len(set(numpy_keys)) == len(numpy_keys)


def test_every_part_of_a_step_has_its_own_dropout_in_every_process() -> None:
    counters = [
        dropout_counter(step, part, 3, process)
        for step, part, process in itertools.product(range(4), range(3), range(5))
    ]
    assert len(set(counters)) == len(counters)


def test_a_generator_of_its_own_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=STEP.generator(0, 1))
    NOISE.reset(torch.Generator(), 0, 5)
    batch_indices(0, 3, 4, 10)
    assert torch.equal(torch.get_rng_state(), before)
    WEIGHTS.reset_global(7)
    assert torch.initial_seed() == 7
