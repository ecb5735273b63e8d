"""Whatever kills a run or spoils its files, what was committed stays, and a restart goes on from it."""

import gc
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

from ununennium.training import Callback, CheckpointCallback, CheckpointError, Trainer
from ununennium.training.checkpoint import Contents, Folder, Writer, newest, read, writer

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

FILES = ["manifest.json", "model.safetensors", "training.json", "training.safetensors"]
VALUES = [2.0, 3.0, 1.0, 2.5, 2.5]  # by epoch, less is better
WRITE = os.write
OPERATIONS = (
    "open", "write", "fsync", "ftruncate", "mkdir", "makedirs", "rename", "replace", "symlink", "link", "unlink",
    "remove", "rmdir",
)  # fmt: skip


class Dictate(Callback):
    """Puts VALUES into the logs."""

    log_names = ("figure",)

    def on_epoch_end(self, trainer, epoch, logs):
        logs["figure"] = VALUES[epoch]


class Telling(Trainer):
    """Writes a byte into a pipe for each checkpoint that is committed."""

    pipe = None

    def save(self, path, *, wait=True, done=None):
        def tell(error):
            if error is None and self.pipe is not None:
                WRITE(self.pipe, b".")
            done(error)

        return super().save(path, wait=wait, done=tell)


def tiny(folder, callbacks=(), batches=1, **kwargs):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    return Telling(
        model,
        torch.optim.Adam(model.parameters(), lr=0.1),
        nn.MSELoss(),
        [(torch.ones(2, 2), torch.ones(2, 1))] * batches,
        callbacks=[Dictate(), *callbacks, CheckpointCallback(folder, "figure", **kwargs)],
        device="cpu",
        progress=False,
        seed=0,
    )


def start(work):
    """Run ``work(pipe)`` in a forked child; return its process id and the pipe's other end."""
    reader, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            gc.disable()  # it would touch, and so copy, all that the parent has
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # nobody else ends a child that hangs
            os.close(reader)
            work(pipe)
            status = 0
        except BaseException:
            WRITE(pipe, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(pipe)
    return child, reader


def ended(child, reader):
    """Return whether a child was killed, and what it told."""
    with open(reader, "rb") as told:
        text = told.read()
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), text.decode()
    return status != 0, text


def die_before(k):
    """Have this process killed before its k-th file operation; before or in the middle of a write."""
    count = 0

    def count_up(*half):
        nonlocal count
        count += 1
        if count == k:
            if half:
                WRITE(*half)
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(name, function):
        def call(*args, **kwargs):
            count_up()
            if name == "write":
                count_up(args[0], args[1][: len(args[1]) // 2])
            return function(*args, **kwargs)

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(name, getattr(os, name)))


def crashes(folder, sabotage=lambda: None):
    """Train epochs 1 to 3 again and again, killed one file operation later each time; yield what was committed."""
    begun = folder.with_name("begun")
    tiny(begun).fit(1)
    killed, k = True, 0
    while killed:
        k += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(begun, folder, symlinks=True)

        def work(pipe, k=k):
            trainer = tiny(folder)
            trainer.pipe = pipe
            sabotage()
            die_before(k)
            trainer.fit(4, resume="auto")

        killed, told = ended(*start(work))
        yield 1 + len(told)
    assert told == b"..."


def damage(folder, epoch):
    """Return what is wrong with a folder in which so many epochs were committed; None if nothing is."""
    try:
        for path in [*folder.glob("step-*"), folder / "best", folder / "last"]:
            read(path)
        found = newest(folder)
    except CheckpointError as error:
        return str(error)
    if found is None or found[1].info["position"]["epoch"] < epoch:
        return f"epoch {epoch} is lost: {found}"
    return None


def epoch_of(path):
    return read(path).info["position"]["epoch"]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """It takes longest by far, and what kill -9 leaves does not depend on it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_killed_before_any_file_operation_a_run_keeps_what_it_had_and_goes_on(tmp_path):
    whole = tiny(tmp_path / "whole")
    whole.fit(5)
    folder = tmp_path / "folder"
    points = 0
    for points, committed in enumerate(crashes(folder), start=1):
        assert damage(folder, committed) is None, points
        for epochs in (4, 5):  # the same again, and one more
            again = tiny(folder)
            assert again.fit(epochs, resume="auto")["figure"] == VALUES[:epochs]
            assert damage(folder, epochs) is None, points
            assert (epoch_of(folder / "best"), epoch_of(folder / "last")) == (3, epochs), points
            assert len(list(folder.iterdir())) == 4, points  # two checkpoints, two pointers: nothing unfinished
        assert torch.equal(again.model.weight, whole.model.weight)
    assert points > 50


def make_the_pointer_anew():
    def point(self, pointer, name):
        (self.path / pointer).unlink(missing_ok=True)
        os.symlink(name, self.path / pointer)

    Folder._point = point


def delete_before_committing():
    new_name = Folder.new_name

    def delete(self, optimizer_steps):
        for old in list(self.path.glob("step-*")):
            shutil.rmtree(old)
        return new_name(self, optimizer_steps)

    Folder.new_name = delete


def commit_file_by_file():
    commit = writer.commit

    def slowly(aside, path, described, info):
        commit(aside, path.parent / "aside", described, info)
        os.mkdir(path)
        for name in FILES:
            os.rename(path.parent / "aside" / name, path / name)
        os.rmdir(path.parent / "aside")

    writer.commit = slowly


@pytest.mark.parametrize("sabotage", [make_the_pointer_anew, delete_before_committing, commit_file_by_file])
def test_a_protocol_that_is_not_safe_is_found_out(tmp_path, sabotage):
    """The controls: without them the test above might see nothing."""
    folder = tmp_path / "folder"
    assert any(damage(folder, committed) for committed in crashes(folder, sabotage))


def small(number):
    position = {"epoch": number, "batch": 0, "optimizer_steps": number}
    return Contents({"w": torch.full((100_000,), float(number))}, {"n": number}, {"run": "r", "position": position})


def save_in(folder, numbers, tell=lambda number: None):
    """Save small contents under these numbers; the folder must hold some already."""
    own, saving = Folder(folder), Writer()
    own.open()
    for number in numbers:
        name = own.new_name(number)

        def done(error, name=name, number=number):
            assert error is None
            tell(number)
            own.settle(name, ["best", "last"] if number % 3 == 0 else ["last"], (), 1, False)

        saving.save(folder / name, small(number), done)
    saving.wait()
    own.close()


def test_200_kills_at_random_moments_lose_nothing(tmp_path):
    draw = random.Random(0)
    save_in(tmp_path, [0])
    number = unfinished = 0
    for _ in range(200):

        def work(pipe, following=number + 1):
            save_in(tmp_path, range(following, 10**6), lambda n: WRITE(pipe, f"{n} ".encode()))

        child, reader = start(work)
        first = os.read(reader, 100)
        time.sleep(draw.uniform(0.001, 0.025))
        os.kill(child, signal.SIGKILL)
        killed, told = ended(child, reader)
        assert killed, first + told
        assert damage(tmp_path, int((first + told).split()[-1])) is None
        unfinished += bool(list(tmp_path.glob(".tmp-*")))
        number = epoch_of(newest(tmp_path)[0]) + 1
        save_in(tmp_path, [number])
        assert damage(tmp_path, number) is None
        assert not list(tmp_path.glob(".tmp-*"))
    assert number > 400  # it was saving
    assert unfinished > 10  # and was killed while it did


def test_what_a_rename_shows_was_flushed_before(tmp_path, monkeypatch):
    """For the power failure that no test can cause: files, then their folder, then the rename, then the pointers."""
    paths, dirty, renamed = {}, set(), []

    def wrap(name, note):
        function = getattr(os, name)

        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            note(result, *args)
            return result

        monkeypatch.setattr(os, name, call)

    def opened(descriptor, path, flags, *mode):
        paths[descriptor] = Path(path)
        if flags & os.O_CREAT:
            dirty.update([Path(path), Path(path).parent])

    def moved(_, source, to):
        assert not [p for p in dirty if Path(source) in (p, *p.parents)]
        if Path(to).name in ("best", "last"):
            assert not dirty
        dirty.add(Path(to).parent)
        renamed.append(Path(to).name)

    tiny(tmp_path).fit(1)
    wrap("open", opened)
    wrap("write", lambda _, descriptor, *data: dirty.add(paths.get(descriptor, tmp_path)))
    wrap("fsync", lambda _, descriptor: dirty.discard(paths[descriptor]))
    for name in ("rename", "replace"):
        wrap(name, moved)
    own = Folder(tmp_path)
    own.open()
    dirty.clear()  # the lock, which is worth nothing
    name = own.new_name(1)
    writer.write(tmp_path / name, small(1))
    assert not dirty
    own.settle(name, ["best", "last"], (), 1, False)
    assert not dirty
    assert renamed == [name, "best", "last"]


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints of a run; the older, the newer."""
    tiny(tmp_path / "folder").fit(2)
    best, last = (tmp_path / "folder" / os.readlink(tmp_path / "folder" / p) for p in ("best", "last"))
    assert newest(tmp_path / "folder")[0] == last != best
    return best, last


def passed_over(file, data, older):
    """Whether the newest checkpoint is passed over for the older one, naming the file, with these data in it."""
    sound = file.read_bytes()
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"{re.escape(str(file))} is damaged.*passed over for the one before"):
        found, _ = newest(older.parent)
    file.write_bytes(sound)
    return found == older


def test_any_flipped_byte_is_found_and_the_checkpoint_before_is_taken(two):
    older, newer = two
    draw = random.Random(0)
    for i in range(100):
        file = newer / FILES[i % len(FILES)]
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= draw.randint(1, 255)
        assert passed_over(file, data, older)
    assert newest(older.parent)[0] == newer


def test_not_even_white_space_in_a_manifest_may_change(two):
    older, newer = two
    data = (newer / "manifest.json").read_bytes()
    places = [i for i, byte in enumerate(data) if byte in b" \n"]
    for place in random.Random(0).sample(places, 30):
        for space in set(b" \n\t\r") - {data[place]}:
            changed = data[:place] + bytes([space]) + data[place + 1 :]
            assert passed_over(newer / "manifest.json", changed, older)
    assert passed_over(newer / "manifest.json", data + b"\n", older)


def test_a_damaged_newest_costs_the_run_only_what_came_after(two):
    _, newer = two
    with (newer / "model.safetensors").open("ab") as file:
        file.write(b"x")
    trainer = tiny(newer.parent)
    with pytest.warns(UserWarning, match="passed over"):
        assert trainer.fit(4, resume="auto")["figure"] == VALUES[:4]
    assert damage(newer.parent, 4) is None


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_a_file_is_passed_over_and_never_run(two, tmp_path, name):
    older, newer = two
    evil = Evil(str(tmp_path / "executed"))
    torch.save(evil, tmp_path / "saved")
    for data in (pickle.dumps(evil), (tmp_path / "saved").read_bytes()):
        assert passed_over(newer / name, data, older)
        assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError):  # the control: it would have run
        pickle.loads(pickle.dumps(Evil(str(tmp_path / "no" / "folder"))))


class FillUp(Callback):
    """No file may grow any more, from an optimizer step on."""

    def on_batch_start(self, trainer, batch_idx):
        if trainer.state.optimizer_steps == 4:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))


def test_a_disk_that_fills_up_ends_the_run_says_so_and_spoils_nothing(tmp_path):
    def work(pipe):
        with pytest.raises(CheckpointError) as raised:
            tiny(tmp_path, [FillUp()], batches=3, every_n_steps=1).fit(4)
        WRITE(pipe, str(raised.value).encode())

    _, message = ended(*start(work))
    pattern = rf"{re.escape(str(tmp_path))}/step-0000000(\d)-\d+ could not be written .*Make room.*resume="
    failed = re.match(pattern, message.decode())
    assert failed, message
    assert damage(tmp_path, 1) is None
    assert read(tmp_path / "last").info["position"]["optimizer_steps"] == int(failed[1]) - 1
    kept = {os.readlink(tmp_path / pointer) for pointer in ("best", "last")}
    assert {p.name for p in tmp_path.iterdir()} == {"best", "last", *kept}
    again = tiny(tmp_path, batches=3, every_n_steps=1)
    assert again.fit(4, resume="auto")["figure"] == VALUES[:4]


def test_nothing_valid_is_no_reason_to_start_anew(two):
    older, newer = two
    for path in two:
        (path / "training.json").write_bytes(b"{}")
    trainer = tiny(newer.parent)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(CheckpointError, match=r"not one of the 2 checkpoints in .* is valid.*move them away"),
    ):
        trainer.fit(4, resume="auto")
    assert trainer.state.optimizer_steps == 0
    assert {p.name for p in newer.parent.iterdir()} == {"best", "last", older.name, newer.name}


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_checkpoints_is_a_start(tmp_path, there):
    if there:
        (tmp_path / "folder").mkdir()
    assert tiny(tmp_path / "folder").fit(2, resume="auto")["figure"] == VALUES[:2]
    assert damage(tmp_path / "folder", 2) is None
