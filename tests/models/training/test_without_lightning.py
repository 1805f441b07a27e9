# SPDX-License-Identifier: Apache-2.0
import re
import sys

import pytest

from ctxops.__main__ import main


@pytest.mark.parametrize("command", ["fit", "resume", "validate", "test"])
def test_training_names_what_it_lacks(command, monkeypatch, capsys):
    pytest.importorskip("torchvision")
    for name in list(sys.modules):
        if name.startswith("ctxops.models.training"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert main([command]) == 1
    # Whichever of its packages it asks for first.
    expected = r'this needs \w+, which is not installed: pip install "ctxops\[train\]"'
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize("command", [["predict", "a", "b"], ["data", "check", "camvid", "x"]])
def test_images_name_what_they_lack(command, monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith(("ctxops.models.data", "ctxops.models.predict")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(command) == 1
    expected = 'this needs PIL, which is not installed: pip install "ctxops[models]"'
    assert expected in capsys.readouterr().err
