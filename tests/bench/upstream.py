"""The smallest OpenAI endpoint there is: each streamed answer is the same tokens with the same timing.

python tests/bench/upstream.py PORT TOKENS FIRST_TOKEN_S TOKEN_S
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import StreamReader, StreamWriter

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"default","choices":[%s]}\n\n'
ROLE = EVENT % b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}'
TOKEN = EVENT % b'{"index":0,"delta":{"content":"a "},"finish_reason":null}'
END = EVENT % b'{"index":0,"delta":{},"finish_reason":"length"}' + b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def converse(reader: StreamReader, writer: StreamWriter, tokens: int, first_s: float, token_s: float) -> None:
    """Requests of one connection until the client closes it."""
    clock = asyncio.get_running_loop().time
    while head := await reader.readuntil(b"\r\n\r\n"):
        lines = dict(line.lower().split(b":", 1) for line in head.splitlines() if b":" in line)
        await reader.readexactly(int(lines[b"content-length"]))
        due = clock() + first_s
        writer.write(HEAD)
        for n in range(tokens):
            await asyncio.sleep(due - clock())
            writer.write(chunk(TOKEN if n else ROLE + TOKEN))
            due += token_s
        writer.write(chunk(END) + b"0\r\n\r\n")


async def serve(port: int, tokens: int, first_s: float, token_s: float) -> None:
    async def connected(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            await converse(reader, writer, tokens, first_s, token_s)
        except (asyncio.IncompleteReadError, ConnectionError):  # the client has gone
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    port, tokens, first_s, token_s = sys.argv[1:]
    uvloop.run(serve(int(port), int(tokens), float(first_s), float(token_s)))
