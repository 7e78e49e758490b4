"""Experiments on real data: configs, commands, figures. The mathematics is in `metagater_jax`."""
