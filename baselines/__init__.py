if __name__ != "dashbench.baselines":
    raise ImportError(
        "./baselines is dashbench.baselines; run `dashbench` or `pytest`, or set PYTHONSAFEPATH=1"
    )
