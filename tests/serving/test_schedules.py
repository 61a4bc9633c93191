"""Many schedules of chunks, drafts and slots against one call per text, in PyTorch (test_state.py: in the kernels)."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.serving_runs import FORMS, Engine, serve


@pytest.mark.parametrize(("dialect", "conv"), FORMS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), texts=st.integers(1, 5), longest=st.integers(1, 24))
def test_any_schedule_equals_one_call(dialect, conv, seed, texts, longest):
    serve(Engine(dialect, conv, torch.device("cpu")), random.Random(seed), texts, longest)
