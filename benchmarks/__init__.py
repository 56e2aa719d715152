"""What PASSION costs: time and memory of the losses and of a training step, beside naive and compiled code.

    python -m benchmarks.losses    # time of each loss term, forward and backward
    python -m benchmarks.step      # time of a training step, plain, naive and ours; overhead in eval()
    python -m benchmarks.memory    # peak memory of both
    python -m benchmarks.report    # tables of docs/performance.md from the results

Results are CSV files in ``benchmarks/results``. Every command compares the numbers of all candidates first and
refuses to report when they differ. See docs/performance.md.
"""
