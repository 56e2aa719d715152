"""Thin helpers for trainers and loggers; each module needs its package only when it is used.

* :mod:`passion_plugin.integrations.lightning`: ``PassionCallback`` (``pip install "passion-plugin[lightning]"``);
* :mod:`passion_plugin.integrations.monai`: ``PassionHandler`` for ``SupervisedTrainer`` and ignite engines (``monai``);
* :mod:`passion_plugin.integrations.tensorboard`: ``TensorBoardLog`` (``tensorboard``);
* :mod:`passion_plugin.integrations.logging`: ``log_metrics`` and ``MetricsLogger``, for anything that takes a dict;
* :mod:`passion_plugin.integrations.loss`: ``PassionLoss``, for trainers that call ``loss(prediction, target)``.
"""
