"""An index of a checkpoint that another Python has written."""

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
