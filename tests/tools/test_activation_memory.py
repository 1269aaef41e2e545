import re
import runpy

import pytest
from places import ROOT

TOOL = ROOT / "tools" / "activation_memory.py"


@pytest.mark.slow
def test_the_table_has_every_policy_and_both_numbers_agree(capsys):
    main = runpy.run_path(str(TOOL))["main"]
    main(["--variants", "SiT-Ti/2", "--pixels", "128", "--precision", "bf16"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == 10
    assert [row.split("|")[3].strip() for row in rows] == [
        "none", "every_k, k 2", "selective, products", "selective, attention", "full",
    ]  # fmt: skip
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert re.fullmatch(r"[+-]\d+\.\d\d%", cells[6])
        assert abs(float(cells[6][:-1])) < 5
        assert cells[7] == cells[8]
    assert float(rows[0].split("|")[7]) == 0
