"""What runs write: progress."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
import jax
import numpy as np
import pytest
import metagater_jax as mg
from configs import cifar10, cifar10_moderate, cifar10_small, cifar100, digits, mnist
from experiments.config import ConfigError
from experiments.config.federated import check_config
from experiments.config.registry import make_network
from experiments.run import main, run
from experiments.runs.records import DivergedError, Progress, load_model, load_parameters
from experiments.runs.programs import Clock
from experiments.studies.sparsity_curve import curve_of_run
from metagater_jax.data.datasets import Dataset, load_dataset
from commands import call


def test_rate_and_time_left_are_without_compilation(monkeypatch, capsys):
  now = [1000.0]
  monkeypatch.setattr("tqdm.std.time", lambda: now[0])
  clock = Clock("compile")
  clock.seconds["compile"] = 5.0  # before the first step
  progress = Progress(100, False, "step", clock)
  for seconds, compiled in ((30, 20), (10, 0)):  # ten for 40 steps each, beside compilation
    now[0] += seconds
    clock.seconds["compile"] += compiled
    progress.advance(40, True)
  progress.close()
  first, second = capsys.readouterr().err.splitlines()
  assert "step 40/100 |  4.00 steps/s | 00:15 left" in first
  assert "step 80/100 |  4.00 steps/s | 00:05 left" in second
