"""Sampling and update on 1, 2, 4 ... GPUs of this host: the fastest mesh, and how close it is to n times one GPU.

    python benchmarks/scaling.py [--gpus=8] [--shape=gpt-oss-120b] [--layers=0] [--batch=128,512] [--context=8192] [--tokens=8192]
        [--row_tokens=32768] [--meshes=1x1,1x2,2x1,...] [--only=decode,update] [--limit=240] [--json=FILE] [--logs=DIR]
        [--record=PREFIX]

Each measurement runs `sampling.py steps` or `update.py` in its own process, which sees as many GPUs as its mesh (data x expert) has
devices. Several run in parallel while there are free GPUs. Decoding is `sampling.py steps --unread`: rows of the context's length, each on
its own pages. The update's microbatch has a row per device. If a measurement fails (512 rows of such a context do not fit on one H200) or
takes longer than `--limit` seconds, this is printed and the others continue.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import figures

HERE = Path(__file__).parent


def meshes_of(gpus: int) -> list[tuple[int, int]]:
    """(data, expert) for 1, 2, 4 ... up to `gpus` GPUs: all GPUs on `expert`, half on `data`, all on `data`."""
    found, count = [], 1
    while count <= gpus:
        found += dict.fromkeys([(1, count), (min(2, count), max(1, count // 2)), (count, 1)])
        count *= 2
    return list(dict.fromkeys(found))


def job(arguments: argparse.Namespace, kind: str, data: int, expert: int, folder: Path) -> dict[str, Any]:
    """One measurement: its command and the file of its result."""
    result = folder / f"{kind}-{data}x{expert}.json"
    options = [f"--shape={arguments.shape}", f"--layers={arguments.layers}", f"--data={data}", f"--expert={expert}", f"--json={result}"]
    devices = data * expert
    if kind == "decode":
        options += [f"--batch={arguments.batch}", f"--prompt={arguments.context - arguments.new}", f"--new={arguments.new}", "--unread"]
        options += [f"--copy_bytes={arguments.copy_bytes}"]
    else:
        rollouts = devices * max(1, arguments.row_tokens // arguments.tokens)
        options += [f"--tokens={arguments.tokens}", f"--row_tokens={arguments.row_tokens}", f"--rows={devices}", f"--rollouts={rollouts}"]
        options += [f"--prompt={min(512, arguments.tokens // 2)}", "--calls=2", "--no_prediction"]
    command = [sys.executable, *((str(HERE / "sampling.py"), "steps") if kind == "decode" else (str(HERE / "update.py"),)), *options]
    return {"kind": kind, "data": data, "expert": expert, "devices": devices, "command": command, "result": result}


def run_all(jobs: list[dict[str, Any]], gpus: int, limit: float, folder: Path) -> None:
    """Runs the jobs in order, each as soon as enough devices are free."""
    waiting, running, free = list(jobs), [], list(range(gpus))
    while waiting or running:
        if waiting and waiting[0]["devices"] <= len(free):
            one = waiting.pop(0)
            one["gpus"], free = free[: one["devices"]], free[one["devices"] :]
            environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, one["gpus"]))}
            one["log"] = (folder / one["result"].with_suffix(".log").name).open("w")
            one["started"] = time.monotonic()
            one["process"] = subprocess.Popen(one["command"], env=environment, stdout=one["log"], stderr=subprocess.STDOUT)
            running.append(one)
            continue
        time.sleep(0.2)
        for one in list(running):
            late = time.monotonic() - one["started"] > limit
            if late:
                one["process"].kill()
            if one["process"].poll() is None and not late:
                continue
            one["process"].wait()
            one["log"].close()
            one["seconds"] = time.monotonic() - one["started"]
            free = sorted(free + one["gpus"])
            running.remove(one)
            name = f"{one['kind']} {one['data']}x{one['expert']}"
            failed = "took too long" if late else "" if one["process"].returncode == 0 else f"failed, see {one['log'].name}"
            print(f"{name}: {failed or 'done'} after {one['seconds']:.0f} s on GPUs {one['gpus']}", flush=True)


def rows_of(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens per second by name; empty if the measurement has no result."""
    if not one["result"].exists():
        return []
    found = json.loads(one["result"].read_text())
    about = {name: one[name] for name in ("data", "expert", "devices")} | {"device": found["device"]}
    if one["kind"] == "decode":
        return [about | {"what": f"decode, {row['batch']} rows", "tokens_per_s": row["tokens_per_s"]} for row in found["rows"]]
    return [
        about | {"what": f"update, {name}", "tokens_per_s": found[name]["tokens_per_s"], "peak_bytes": found[name].get("peak_bytes")}
        for name in ("gradient", "update")
        if name in found
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Tokens per second of each measurement, also relative to one device."""
    lines = [f"{'what':22s} data x expert    tokens/s   of one   a device"]
    for what in dict.fromkeys(row["what"] for row in rows):
        of_what = [row for row in rows if row["what"] == what]
        one = next((row["tokens_per_s"] for row in of_what if row["devices"] == 1), None)
        for row in of_what:
            ratio = f"{row['tokens_per_s'] / one:6.2f} x {row['tokens_per_s'] / one / row['devices']:8.0%}" if one else ""
            lines.append(f"{what:22s} {row['data']:4d} x {row['expert']:<6d} {row['tokens_per_s']:11,.0f} {ratio}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--shape", default="gpt-oss-120b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--batch", default="128,512", help="decode batch sizes, measured one after another")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a row at the end of the measured decoding")
    parser.add_argument("--new", type=int, default=160, help="the part of them that is decoded")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a rollout of the update")
    parser.add_argument("--row_tokens", type=int, default=32768, help="tokens of a row of the update")
    parser.add_argument("--meshes", default="", help="data x expert, such as 1x1,1x2; by default those of 1, 2, 4 ... GPUs")
    parser.add_argument("--only", default="decode,update")
    parser.add_argument("--limit", type=float, default=240, help="maximum seconds of a measurement")
    parser.add_argument("--copy_bytes", type=int, default=1 << 32, help="size of the array that is copied to measure bandwidth")
    parser.add_argument("--json", type=Path)
    figures.add_record(parser)
    parser.add_argument("--logs", type=Path, default=Path("scaling"), help="folder for the results and logs of the measurements")
    arguments = parser.parse_args()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    named = [tuple(map(int, mesh.split("x"))) for mesh in arguments.meshes.split(",") if mesh]
    meshes = [mesh for mesh in named or meshes_of(arguments.gpus) if mesh[0] * mesh[1] <= arguments.gpus]
    jobs = [job(arguments, kind, *mesh, arguments.logs) for kind in arguments.only.split(",") for mesh in meshes]
    jobs.sort(key=lambda one: one["devices"])  # those with few devices run in parallel
    run_all(jobs, arguments.gpus, arguments.limit, arguments.logs)
    rows = [row for one in jobs for row in rows_of(one)]
    print(table(rows), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"command": " ".join(["python", *sys.argv]), "rows": rows}, indent=1) + "\n")
    for row in rows:
        name = f"{row['what'].replace(', ', '_').replace(' rows', '')}_{row['data']}x{row['expert']}_tokens_per_s"
        figures.record(arguments.record, {name: (row["tokens_per_s"], "tokens/s")}, devices=row["devices"])


if __name__ == "__main__":
    main()
