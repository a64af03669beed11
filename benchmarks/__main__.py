"""`python -m benchmarks`: every benchmark once, at this machine's default size."""

from benchmarks import decode, groups, operations, precompute, recipe, roofline, scaling, stream, train_step


def main() -> None:
    for benchmark in (train_step, recipe, precompute, groups, operations, decode, scaling, stream, roofline):
        benchmark.main([])
        print(flush=True)


if __name__ == "__main__":
    main()
