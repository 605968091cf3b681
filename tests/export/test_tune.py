from pathlib import Path
import pytest, shutil
from runtime.bundle import Bundle
from runtime.sampler import Sampler
from export.tune import Settings, tune

def test_x(bundle_copy, tmp_path):
    b=Bundle.load(bundle_copy)
    f=tune(b,[3],None,Settings(samples=8,held_out=8,starts=2,tries=1,iterations=2),tmp_path/"w")
    print(f.tuned[3].made)
    print((bundle_copy/"README.md").read_text())
    print(list(bundle_copy.rglob("*")))
