"""Windows on a local Ray cluster: the bytes of threads, order, workers that die, errors, and who ends what."""
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from aerial_nb.data.raster import DataError, write_raster
from aerial_nb.scenes.cluster import MORE, Staff, Worker, joined, named, staff_for
from aerial_nb.scenes.windowmap import cover, map_windows

ROOT = Path(__file__).parents[1]
cloudpickle.register_pickle_by_value(sys.modules[__name__])   # workers do not know this file


@pytest.fixture(scope="module")
def ray():
    pytest.importorskip("ray", reason="Ray is not installed")
    with joined("", cpus=2) as ray: yield ray


@pytest.fixture
def narrow():
    "One thread for models, here and there."
    import torch
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def smooth(shape):
    noise = np.random.default_rng(0).normal(size=(3, shape[0] + 4, shape[1] + 4)).cumsum(1).cumsum(2)
    soft = noise[:, 4:, 4:] - noise[:, :-4, 4:] - noise[:, 4:, :-4] + noise[:, :-4, :-4]
    return (120 + 12 * soft).clip(1, 254).astype("uint8")


def save(folder):
    import torch
    from aerial_nb.models.zoo import build
    from aerial_nb.training.saved import save_model
    torch.manual_seed(1)
    how = dict(width=8, depth=2, bands=3)
    model = build("unet", **how).eval()
    with torch.no_grad(): model.score.weight *= 60
    save_model(folder, model, "unet", how, stats=((120.,) * 3, (50.,) * 3), threshold=0.5, gsd_m=0.5, data="elsewhere", extra=dict(size=128))


class Fragile:
    "Doubles; its process is killed (-9) at the number `at`, `times` times."
    def __init__(self, folder, at, times=1): self.folder, self.at, self.times = Path(folder), at, times
    def __call__(self, i):
        done = len(list(self.folder.glob("death*")))
        if i == self.at and done < self.times:
            (self.folder / f"death{done}").touch(); os.kill(os.getpid(), signal.SIGKILL)
        return 2 * i


# ---- the same bytes

class FragileEye:
    "Gives a model whose process is killed (-9) at its third batch, once."
    def __init__(self, make, mark): self.make, self.mark = make, mark
    def __call__(self, device):
        predict, calls = self.make(device), []
        def probabilities(pixels, valid):
            calls.append(0)
            if len(calls) == 3 and self.mark.parent.name == "there" and not self.mark.exists():
                self.mark.touch(); os.kill(os.getpid(), signal.SIGKILL)
            return predict(pixels, valid)
        return probabilities


def test_a_whole_raster_has_the_bytes_of_threads_also_when_a_worker_is_killed(ray, narrow, tmp_path, monkeypatch):
    from rasterio.transform import from_origin
    from aerial_nb.scenes.eyes import Look, open_eyes
    from aerial_nb.scenes.rasters import predict_raster
    monkeypatch.chdir(tmp_path)   # relative paths mean the same to a worker
    write_raster("image.tif", smooth((400, 340)), crs="EPSG:32633", transform=from_origin(5e5, 5e6, 0.5, 0.5))
    save(Path("model"))
    eye, maps = open_eyes("model")[0], {}
    for place, backend in (("here", "threads"), ("there", "ray")):
        Path(place).mkdir()
        fragile = replace(eye, make=FragileEye(eye.make, Path(place) / "died"))
        made = predict_raster("image.tif", [fragile], f"{place}/map.tif", Look(size=128, batch=2, dtype="float32"), backend=backend, progress=False)
        maps[place] = made.path.read_bytes()
    assert Path("there/died").exists() and maps["here"] == maps["there"] and len(maps["here"]) > 50_000
    assert ray.is_initialized()   # what was there before is left


# ---- order, errors, deaths

def test_results_come_in_order_and_few_are_held(ray):
    started = []
    def slow(i): time.sleep(0.002 * (i % 3)); return i
    def windows():
        for i in range(60): started.append(i); yield i
    for i, out in enumerate(map_windows(slow, windows(), "ray", workers=2, ahead=5)):
        assert out == i and len(started) <= i + 5
    (whole,) = map_windows(np.ones, [(600, 600)], "ray", workers=1)
    whole += 1   # not a view of Ray's store
    assert i == 59 and list(map_windows(slow, [], "ray")) == []


class Odd(Exception):
    def __init__(self, one, two): super().__init__(one)


def test_an_error_comes_where_its_result_would_and_as_itself(ray):
    def fails(i):
        if i == 3: raise DataError("three is no window")
        if i == 5: raise Odd("cannot", "travel")
        return i
    results = map_windows(fails, range(9), "ray")
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError) as seen: next(results)
    assert type(seen.value) is DataError and str(seen.value) == "three is no window" and "in fails" in "".join(seen.value.__notes__)
    with pytest.raises(TypeError, match="Odd: cannot cannot travel"): list(map_windows(fails, [5], "ray"))
    with pytest.raises(TypeError, match="result of type generator cannot travel"): list(map_windows(lambda i: (j for j in "ab"), [5], "ray"))
    with pytest.raises(KeyboardInterrupt): list(map_windows(_interrupts, [1], "ray"))


def _interrupts(_): raise KeyboardInterrupt


def test_windows_of_dead_workers_are_done_again(ray, tmp_path, caplog):
    assert list(map_windows(Fragile(tmp_path, 7, times=MORE), range(12), "ray")) == [2 * i for i in range(12)]
    assert len(list(tmp_path.glob("death*"))) == MORE and "a worker died at the window 7" in caplog.text


@pytest.mark.slow
def test_a_window_that_always_kills_is_named(ray, tmp_path):
    plan, got = cover((700, 900), 256), []
    def deadly(window): return Fragile(tmp_path, 6 * 192 + 0, times=99)(6 * int(window["row"]) + int(window["col"]))
    with pytest.raises(DataError, match=r"^window of rows 192..448, columns 0..256: 4 workers died"):
        for out in map_windows(deadly, plan.seen, "ray"): got.append(out)
    assert len(got) == 5 and len(list(tmp_path.glob("death*"))) == MORE + 1


@pytest.mark.slow
def test_a_worker_killed_from_outside(ray, tmp_path):
    def slow(i): (tmp_path / f"pid{i}").write_text(str(os.getpid())); time.sleep(0.2); return i, os.getpid()
    results, out = map_windows(slow, range(8), "ray", workers=2), []
    out.append(next(results))
    os.kill(out[0][1], signal.SIGKILL)
    out.extend(results)
    assert [i for i, _ in out] == list(range(8)) and len({pid for _, pid in out}) >= 2


# ---- workers

def test_a_worker_has_its_threads_its_folder_and_the_function_once(ray, narrow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    class Model:
        device = "cpu"
        def __call__(self, i):
            import torch
            self.calls = getattr(self, "calls", 0) + 1
            return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.getcwd(), os.getpid(), self.calls
    out = list(map_windows(Model(), range(20), "ray", workers=2))
    assert {o[:3] for o in out} == {(1, "1", str(tmp_path))}
    pids = [o[3] for o in out]
    assert len(set(pids)) == 2 and os.getpid() not in pids and max(o[4] for o in out) == max(map(pids.count, pids))


def test_a_worker_with_a_gpu_of_its_own_sees_it_as_the_first():
    class Model:
        device = "cuda:3"
        def __call__(self, i): return self.device
    worker = Worker(cloudpickle.dumps(Model()), 1, "no such folder")
    assert pickle.loads(worker.run(cloudpickle.dumps(0))) == (True, "cuda")


def test_workers_fit_into_the_cluster(caplog):
    assert staff_for("", 1, 3, [dict(CPU=2.), dict(CPU=2.)]) == Staff(3, 1)
    assert staff_for("cpu", 2, 3, [dict(CPU=2.), dict(CPU=3.), {}]) == Staff(2, 2)
    assert staff_for("cuda:0", 8, 9, [dict(CPU=8., GPU=2.), dict(CPU=8.)]) == Staff(2, 1, 1, 2)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert staff_for("cpu", 16, 3, [dict(CPU=8.), dict(CPU=4.)]) == Staff(1, 8) and "last bits" in caplog.text
    with pytest.raises(DataError, match="no GPU"): staff_for("cuda", 1, 1, [dict(CPU=2.)])
    with pytest.raises(DataError, match="no core"): staff_for("", 1, 1, [{}])


def test_windows_in_words():
    seen = cover((700, 900), 256).seen
    assert named(seen[5:7]) == "window of rows 192..448, columns 0..448" and named(seen[0]) == "window of rows 0..256, columns 0..256"
    assert named(7) == "window 7" and len(named("x" * 999)) < 220


# ---- who is missing, who ends what

def test_ray_is_missing(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'aerial_nb\[cluster\]'"): map_windows(abs, [1], "ray")


def test_ray_is_imported_when_it_is_used_only():
    code = "import sys, aerial_nb.scenes.rasters, aerial_nb.scenes.cluster; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "False"


JOB = """
import os, sys, time
from aerial_nb.scenes.cluster import joined
from aerial_nb.scenes.windowmap import map_windows
if __name__ == "__main__":
    wait = float(sys.argv[1])
    def slow(i): time.sleep(wait); return i
    try:
        for i in map_windows(slow, range(6), "ray"):
            import ray
            if i == 0: print(ray._private.worker._global_node.get_temp_dir_path(), flush=True)
    except KeyboardInterrupt: raise SystemExit(130)
    print(i, ray.is_initialized(), flush=True)
"""


def left_over(folder: str) -> list[str]:
    "Processes that have a folder in their command line."
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try: text = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError: continue
        if folder in text: found.append(text)
    return found


@pytest.mark.slow
def test_what_is_started_here_ends_here_also_when_interrupted(tmp_path):
    pytest.importorskip("ray")
    script = tmp_path / "job.py"; script.write_text(JOB)
    own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "AERIAL_CLUSTER")} | dict(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, script, "0"], capture_output=True, text=True, env=own, cwd=tmp_path, timeout=120)
    folder, last = done.stdout.strip().splitlines()
    assert last == "5 False" and len(folder) < 30 and not Path(folder).exists() and not left_over(folder), done.stdout + done.stderr
    job = subprocess.Popen([sys.executable, script, "5"], stdout=subprocess.PIPE, text=True, env=own, cwd=tmp_path, start_new_session=True)
    folder = job.stdout.readline().strip()
    assert left_over(folder)
    os.killpg(job.pid, signal.SIGINT)   # as a terminal does
    assert job.wait(60) == 130
    time.sleep(2)
    assert not left_over(folder) and not Path(folder).exists()


@pytest.mark.slow
def test_a_cluster_at_an_address_is_joined_and_left(ray, tmp_path):
    script = tmp_path / "job.py"; script.write_text(JOB)
    env = os.environ | dict(AERIAL_CLUSTER=ray.get_runtime_context().gcs_address, PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, script, "0"], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert done.stdout.strip().splitlines()[-1] == "5 False", done.stdout + done.stderr
    assert list(map_windows(lambda i: i + 1, range(3), "ray")) == [1, 2, 3]
    code = ("from aerial_nb.scenes.windowmap import map_windows\n"
            "try: list(map_windows(abs, [1], 'ray'))\nexcept ValueError as error: print(type(error).__name__, error)")
    nobody = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env | dict(AERIAL_CLUSTER="127.0.0.1:9"), cwd=tmp_path)
    assert "DataError no Ray cluster at '127.0.0.1:9'" in nobody.stdout and "ray start --head" in nobody.stdout, nobody.stdout + nobody.stderr
