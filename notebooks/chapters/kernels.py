"""Notebooks executed by papermill, each in a kernel of its own, which can be ended from outside."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from weakref import WeakSet

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager

_started: "WeakSet[AsyncKernelManager]" = WeakSet()  # by this process


class ChapterError(RuntimeError):
    """A chapter failed; the message names the cell and the exception."""


def execute(
    notebook: Path,
    output: Path,
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    log: TextIO | None = None,
) -> None:
    """Execute a notebook into `output`; a failed one is kept in the folder above.

    given: parameters. environment: variables of the kernel. log: takes what the cells write to stderr, such
    as their bars; without one that is shown, with papermill's own bar. Raises ChapterError if a cell fails or
    the kernel dies.
    """
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    failed = output.parent.parent / f"{output.stem}.failed.ipynb"
    try:
        _papermill(notebook, output, given, environment, log)
    except PapermillExecutionError as error:
        os.replace(output, failed)
        line = error.source.strip().splitlines()[0]
        cause = f"{error.ename}: {error.evalue}".splitlines()[0]
        place = f"{output.stem} failed in cell [{error.exec_count}] ({line})"
        raise ChapterError(f"{place}: {cause} (see {failed})") from None
    except DeadKernelError as error:
        os.replace(output, failed)
        cause = "its kernel died, perhaps for lack of memory"
        raise ChapterError(f"{output.stem}: {cause} (see {failed})") from error


def end_kernels() -> None:
    """Kill all kernels of this process with what they started; those who wait for them get an error."""
    for manager in list(_started):
        process = getattr(manager.provisioner, "process", None)
        if process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a kernel leads a group of its own


def _papermill(
    notebook: Path, output: Path, given: Mapping[str, Any], environment: Mapping[str, str], log: TextIO | None
) -> None:
    import nbformat
    import papermill

    started = time.monotonic()
    with _closed_loop():
        executed = papermill.execute_notebook(
            notebook,
            output,
            dict(given),
            kernel_name="python3",
            language="python",
            kernel_manager_class=_own_kernel(environment),
            store_widget_state=True,
            progress_bar=False if log else {"desc": output.stem},
            stderr_file=log or sys.stderr,
        )
    for part in (executed, *executed.cells):  # times and paths of this machine, which a page would publish
        part.metadata.pop("papermill", None)
    executed.metadata["fihelpers"] = {"seconds": round(time.monotonic() - started, 1)}
    nbformat.write(executed, output)


@contextmanager
def _closed_loop() -> Iterator[None]:
    """Close the event loop that Jupyter's clients open on a thread and leave open."""
    from jupyter_core.utils import ensure_event_loop

    try:
        yield
    finally:
        loop = ensure_event_loop()
        if not loop.is_running():  # it runs where this is called from a notebook
            loop.close()
            asyncio.set_event_loop(None)


def _own_kernel(environment: Mapping[str, str]) -> type:
    """A kernel manager that starts the running interpreter, whatever kernel specs the machine holds."""
    import zmq
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class OwnKernel(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(**get_kernel_dict(), env=dict(environment))

        @default("transport_encryption")
        def _encrypted(self) -> str:
            return "auto" if zmq.has("curve") else "disabled"

        async def _async_launch_kernel(self, kernel_cmd: list[str], **more: Any) -> None:
            _started.add(self)
            await super()._async_launch_kernel(kernel_cmd, **more)

    return OwnKernel
