"""`python -m metagater_jax.data.prepare mnist [--data_dir=DIR]`: downloads a TFDS set once. Needs the extra `prepare`."""

import argparse
import os
import sys

from metagater_jax.data.datasets import DatasetError, prepare_dataset


def main(arguments: list[str] | None = None) -> int:
  """Returns the exit status: 0, or 2 with a message on standard error."""
  parser = argparse.ArgumentParser(prog="python -m metagater_jax.data.prepare", description=__doc__.split(":", 1)[1].strip())
  parser.add_argument("dataset", help="name in TFDS, as mnist, cifar10, cifar100")
  parser.add_argument("--data_dir", help="where to put it (default: TFDS's own)")
  options = parser.parse_args(arguments)
  try:
    if options.data_dir:
      os.makedirs(options.data_dir, exist_ok=True)
    prepare_dataset(options.dataset, options.data_dir)
  except OSError as error:
    print(f"the folder {options.data_dir} cannot be made ({error.strerror or error}); give another with --data_dir=FOLDER.", file=sys.stderr)
    return 2
  except DatasetError as error:
    print(error, file=sys.stderr)
    return 2
  print(f"{options.dataset} is ready.")
  return 0


if __name__ == "__main__":
  sys.exit(main())
