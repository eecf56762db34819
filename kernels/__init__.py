if __name__ != "dashbench.kernels":
    raise ImportError("./kernels is dashbench.kernels; run `dashbench` or `pytest`, or set PYTHONSAFEPATH=1")
