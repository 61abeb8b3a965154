"""Plugin packages that look installed: a folder for PYTHONPATH with code and dist-info."""

import shutil
import tomllib


def site_of(package, site):
    """Copy a project's package (in ``src/``) and its metadata into ``site``, and return it."""
    project = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]
    shutil.copytree(package / "src", site, dirs_exist_ok=True)
    write_metadata(site, project["name"], project["version"], project["entry-points"]["modulora"])
    return site


def write_metadata(site, name, version, quantizers):
    """The dist-info of a distribution with the entry points of these quantizers."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = "".join(f"{quantizer} = {module}\n" for quantizer, module in quantizers.items())
    (info / "entry_points.txt").write_text(f"[modulora]\n{points}")
