"""The model room is tested on the CPU, also where a GPU is: there models would load in bfloat16 by default."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def cpu_only():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
