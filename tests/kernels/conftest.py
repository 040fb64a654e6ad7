"""Each test of this folder runs on the CPU, there with the definitions, and on a GPU with the Triton kernels.

test_interpreter.py runs the folder once more under TRITON_INTERPRET=1: then the CPU runs the kernels.
"""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
