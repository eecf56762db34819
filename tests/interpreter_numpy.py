"""Triton 3.6's interpreter turns loop bounds into integers by `int(array)`, which numpy 2.4 refuses for
one-element arrays."""


def allow_loop_bounds() -> None:
    """Let interpreted kernels use loaded values as loop bounds (numpy >= 2.4)."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
