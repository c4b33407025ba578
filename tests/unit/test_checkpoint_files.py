"""An index of a checkpoint that another Python has written, and names of checkpoints."""

import io

import pytest

from moe_dit import checkpoint_files


def test_an_enum_s_member_is_read_as_older_pythons_pickle_it():
    """Python 3.11.0 to 3.11.3 write getattr(enum, name); getattr of anything else is refused."""
    enum = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
    member = b"cbuiltins\ngetattr\n(" + enum + b"S'TORCH_CONTIGUOUS_FORMAT'\ntR."
    assert checkpoint_files._Unpickler(io.BytesIO(member)).load().arguments == ("TORCH_CONTIGUOUS_FORMAT",)
    other = b"cbuiltins\ngetattr\n(ctorch\nSize\nS'__class__'\ntR."
    with pytest.raises(ValueError, match="could run code"):
        checkpoint_files._Unpickler(io.BytesIO(other)).load()


def test_a_name_of_thousands_of_digits_is_no_checkpoint_s():
    """Python turns no more than 4300 into a number."""
    names = ["step_00000012", "step_123456789", f"step_{2**63 - 1}", "step_12", "step_000000012", "step_00000012.bak"]
    assert list(map(checkpoint_files.step_of, names)) == [12, 123456789, 2**63 - 1, None, None, None]
    assert checkpoint_files.step_of("step_1" + 4999 * "0") is None
