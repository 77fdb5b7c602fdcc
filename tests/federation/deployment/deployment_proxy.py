"""A TCP proxy of the tests' own: it counts bytes, and cuts the network on demand."""

import asyncio
import contextlib
import threading


class Proxy:
    """Stands between a data holder and the server.

    Parameters
    ----------
    target : int
        Port on 127.0.0.1 that it passes everything on to.

    Attributes
    ----------
    port : int
        Where it listens, on 127.0.0.1.
    up, down : int
        Bytes from the holder and to it, TLS included, TCP's own headers not.
    connections : int
        Accepted so far.
    """

    def __init__(self, target: int) -> None:
        self.target, self.up, self.down, self.connections = target, 0, 0, 0
        self._cut = self._silent = False
        self._lost: set[asyncio.StreamWriter] = set()  # of connections that neither end knows to be gone
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result(30)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Drop every connection and refuse new ones."""
        self._cut = True
        self._loop.call_soon_threadsafe(self._drop)

    def silence(self) -> None:
        """Swallow everything, as a firewall does that has forgotten its connections: neither end is told.

        Those that are open now, or are opened until `mend`, never carry anything again.
        """
        self._silent = True
        self._loop.call_soon_threadsafe(lambda: self._lost.update(self._open))

    def mend(self) -> None:
        """Let new connections pass again."""
        self._cut = self._silent = False

    def close(self) -> None:
        """End the proxy and its thread."""
        self._cut = True
        self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._drop)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _drop(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._cut:
            writer.transport.abort()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        if self._silent:
            self._lost |= {writer, back}
        await asyncio.gather(self._pump(reader, back, True), self._pump(there, writer, False))
        writer.close()
        back.close()
        self._open -= {writer, back}
        self._lost -= {writer, back}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if writer in self._lost:
                    continue
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                writer.write(data)
                await writer.drain()
        if writer not in self._lost:  # whose other end must not hear that this one has given up
            with contextlib.suppress(OSError):
                writer.close()
