"""A controlled comparison of training strategies on incomplete data, and its report.

    python -m examples.experiment --strategies plain passion --folds 0 1 --seeds 0 1 --results runs/mine
    python -m examples.experiment report --results runs/mine --out runs/mine/docs

Every cell of the comparison is one training: a backbone, an assignment of missing rates to modalities, a fold, a
seed, a batch size and a strategy. All strategies get the same steps and start from the same weights; those that
draw the data alike see the same batches.
"""
