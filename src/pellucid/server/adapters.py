"""LoRA adapters that come and go while the server runs, by vLLM's endpoints: /v1/load_lora_adapter, /v1/unload_lora_adapter.

Only from the folder that the server was started with (`--adapters FOLDER`): a client must not make it read any other file.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import Field

from pellucid.server.conversation import Body
from pellucid.server.errors import Refused
from pellucid.server.jobs import Desk


class LoadRequest(Body):
    """lora_path: below the folder of adapters.  base_model: the model that it belongs to; by default the first."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    base_model: str | None = None


class UnloadRequest(Body):
    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None


def add_adapters(app: FastAPI, desk: Desk, root: Path | None) -> None:
    one_at_a_time = asyncio.Lock()

    def folder_of(path: str) -> Path:
        if root is None:
            raise Refused(403, "adapters are loaded only where the server was started with --adapters FOLDER", "lora_path", "not_allowed")
        try:
            found = (root / path).resolve()
            inside = found.is_relative_to(root.resolve()) and found.is_dir()
        except (OSError, ValueError) as error:
            raise Refused(400, f"{path!r} is no path", "lora_path", "invalid_value") from error
        if not inside:
            raise Refused(400, f"there is no folder {path!r} among the adapters", "lora_path", "invalid_value")
        return found

    @app.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load(body: LoadRequest) -> str:
        async with one_at_a_time:
            await asyncio.to_thread(desk.registry.add_adapter, body.lora_name, folder_of(body.lora_path), body.base_model)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload(body: UnloadRequest) -> str:
        async with one_at_a_time:
            desk.registry.remove_adapter(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def add_all(desk: Desk, root: Path) -> list[str]:
    """Serves every adapter that lies in the folder now, under the names of its folders."""
    found = sorted(path.parent for path in root.glob("*/adapter_config.json"))
    return [desk.registry.add_adapter(path.name, path).name for path in found]
