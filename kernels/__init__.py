"""DashAttention in Triton: `dash_attention`, its stages, and block-sparse attention over any routing."""

from importlib import import_module

if __name__ != "dashbench.kernels":
    raise ImportError("./kernels is dashbench.kernels; run `dashbench` or `pytest`, or set PYTHONSAFEPATH=1")

# Imported when asked for: listing methods must not need torch.
_HOME = {
    "dash_attention": "dash",
    "dash_options": "dash",
    "DashAttention": "module",
    "DashCache": "cache",
    "attend_cache": "decode",
    "decode_attention": "decode",
    "summarize_chunks": "summarize",
    "route_chunks": "route",
    "block_sparse_attention": "attend",
    "routes_of_mask": "attend",
    "band_attention": "band",
    "select_blocks": "selection",
    "mean_windows": "compress",
    "BlockDecodeStep": "decode_blocks",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
