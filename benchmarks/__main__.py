"""`python -m benchmarks`: every benchmark once, at this machine's default size."""

from benchmarks import decode, groups, precompute, recipe, roofline, scaling, stream, train_step


def main() -> None:
    for benchmark in (train_step, recipe, precompute, groups, decode, scaling, stream, roofline):
        benchmark.main([])
        print(flush=True)


if __name__ == "__main__":
    main()
