"""What is told although nothing fails."""


class SparsityWarning(UserWarning):
    """A ticket that works otherwise than its user may think; the message says what to do about it."""


class ShortSearchWarning(SparsityWarning):
    """A search whose gates ended far from the sparsity asked for."""
