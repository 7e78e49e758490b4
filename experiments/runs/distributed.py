"""Joins the processes of a run on several hosts: `jax.distributed`, with a roll call that says who is missing.

JAX's own runtime does the rest: after this `jax.devices()` are the devices of all processes, and a mesh of them spreads tasks
over hosts as it does over the devices of one.
"""

import os
import socket
import time

import jax

from experiments.config import ConfigError

__all__ = ["join", "roll_call"]


def join(
  coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *, environment: bool = False, timeout: int = 300
) -> None:
  """Makes this process one of several; without arguments it stays alone. To be called before anything is computed.

  Args:
    coordinator: "host:port" of process 0, reachable from all; the port is free there.
    num_processes: how many there are.
    process_id: number of this one, 0 … num_processes − 1.
    environment: take all three from a TPU pod, SLURM or MPI, as `jax.distributed.initialize` finds them.
    timeout: seconds to wait for the others.

  Raises:
    ConfigError: an incomplete or impossible set of arguments, or a process that does not come within the time.
  """
  given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  if environment:
    if any(value is not None for value in given.values()):
      raise ConfigError("--distributed takes coordinator, num_processes and process_id from the environment; give either that or these flags.")
    try:
      jax.distributed.initialize(initialization_timeout=timeout)
    except (ValueError, RuntimeError) as error:
      raise ConfigError(
        "--distributed found no TPU pod, SLURM or MPI environment to join "
        f"({str(error).splitlines()[0]}); give --coordinator, --num_processes and --process_id."
      ) from error
    return
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return
  if missing:
    raise ConfigError(
      f"a run on several processes needs --coordinator, --num_processes and --process_id; {', '.join(missing)} "
      f"{'is' if len(missing) == 1 else 'are'} missing."
    )
  if num_processes < 1 or not 0 <= process_id < num_processes:
    raise ConfigError(f"process_id must lie in 0 ... num_processes - 1, got process_id={process_id} and num_processes={num_processes}.")
  roll_call(coordinator, num_processes, process_id, timeout)
  jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=timeout)


def roll_call(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
  """Returns when all processes have called it.

  `jax.distributed.initialize` ends a process without an exception when another one does not come. So that there is an error
  that names what is missing, process 0 first hears all others on the coordinator's port, which it then leaves to JAX.

  Raises:
    ConfigError: an address that is not "host:port" or not free, or somebody who did not come within `timeout` seconds.
  """
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ConfigError(f"--coordinator must be host:port, got '{coordinator}'.")
  deadline = time.monotonic() + timeout
  (_hear_all if process_id == 0 else _report)((host, int(port)), num_processes, process_id, deadline, timeout)


def _hear_all(address, num_processes, _, deadline, timeout):
  heard = {}
  try:
    listener = socket.create_server(("", address[1]), backlog=num_processes)
  except OSError as error:
    raise ConfigError(
      f"process 0 cannot listen on port {address[1]} of --coordinator={address[0]}:{address[1]}: "
      f"{os.strerror(error.errno) if error.errno else error}. Choose a port that is free."
    ) from error
  try:
    with listener:
      while len(heard) < num_processes - 1:
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
          connection, _ = listener.accept()
        except TimeoutError:
          absent = sorted(set(range(1, num_processes)) - set(heard))
          raise ConfigError(
            f"{num_processes - len(absent)} of {num_processes} processes came within {timeout:g} s; missing: "
            f"process_id {', '.join(map(str, absent))}. Start them with --coordinator={address[0]}:{address[1]} "
            f"--num_processes={num_processes}, and see that they reach that address."
          ) from None
        connection.settimeout(5)
        try:
          number, count = map(int, connection.makefile().readline().split())
        except (OSError, ValueError):  # somebody else on this port
          connection.close()
          continue
        if count != num_processes or number in heard:
          wrong = f"says num_processes is {count}, here it is {num_processes}" if count != num_processes else "came twice"
          connection.sendall(f"process {number} {wrong}.\n".encode())
          connection.close()
          raise ConfigError(f"process {number} {wrong}.")
        heard[number] = connection
    for connection in heard.values():
      connection.sendall(b"go\n")
  finally:
    for connection in heard.values():
      connection.close()


def _report(address, num_processes, process_id, deadline, timeout):
  while True:
    left = deadline - time.monotonic()
    try:
      with socket.create_connection(address, timeout=max(left, 0.01)) as connection:
        connection.sendall(f"{process_id} {num_processes}\n".encode())
        connection.settimeout(max(left, 0.01))
        answer = connection.makefile().readline().strip()
    except socket.gaierror as error:
      raise ConfigError(f"the host of --coordinator={address[0]}:{address[1]} is not known here: {error.strerror}.") from error
    except OSError:
      answer = None
    if answer == "go":
      return
    if answer:
      raise ConfigError(answer)
    if time.monotonic() >= deadline:
      raise ConfigError(
        f"process {process_id} did not get a go from the coordinator {address[0]}:{address[1]} within "
        f"{timeout:g} s: process 0 is not there, cannot be reached, or is missing another process (it says "
        "which)."
      )
    time.sleep(0.2)
