"""What a user sees while it runs."""

import os
import pty
import re
import subprocess
import sys
import termios
import textwrap

from ununennium.training import CheckpointCallback

SCRIPT = textwrap.dedent("""
    import torch, time
    from ununennium.training import Trainer
    class Slow(Trainer):
        def compute_loss(self, batch):
            time.sleep(0.06)
            return super().compute_loss(batch)
    model = torch.nn.Linear(2, 1)
    batches = [(torch.ones(2, 2), torch.ones(2, 1))] * 10
    Slow(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss(), batches, device="cpu").fit(2)
""")


def test_a_table_without_a_terminal_and_nothing_else():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert re.fullmatch(r"seed \d+", lines[0])
    assert lines[1].split() == ["epoch", "train_loss", "lr", "seconds"]
    assert [line.split()[0] for line in lines[2:]] == ["1/2", "2/2"]
    assert run.stderr == ""


def shown_on_a_terminal(script):
    """Run a script on a pseudo-terminal of 100 columns; return its exit status and all that it wrote."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=side, stderr=side)
    os.close(side)
    chunks = []
    try:
        while chunk := os.read(main, 4096):
            chunks.append(chunk)
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(main)
    return process.wait(), b"".join(chunks).decode()


def test_a_bar_with_the_loss_on_a_terminal():
    status, text = shown_on_a_terminal(SCRIPT)
    assert status == 0
    assert re.search(r"epoch 1/2: +\d+%\|", text)
    assert re.search(r"loss \d+\.\d{4}", text)
    assert len(re.findall(r"(?m)^.*?\d/2 +\d\.\d{4} +1\.00e-01", text)) == 2


def test_an_error_begins_on_a_line_of_its_own():
    status, text = shown_on_a_terminal(SCRIPT.replace("time.sleep(0.06)", "time.sleep(0.06); batch[2]"))
    assert status == 1
    before = text[: text.index("Traceback")]
    assert "epoch 1/2" in before
    assert before[-1] in "\r\n"


def test_silence(scripted, capsys, tmp_path):
    scripted([1.0], [CheckpointCallback(tmp_path, "figure")]).fit(1)
    assert capsys.readouterr() == ("", "")
