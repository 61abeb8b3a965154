"""The model of an installed package, with its first decoder blocks only, for short tests."""

import re
from importlib.util import find_spec
from pathlib import Path


def with_first_blocks(package, folder, count):
    """Write a package of the same name, whose GGUF file has the first decoder blocks only."""
    import gguf

    spec = find_spec(package)
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").touch()
    read = gguf.GGUFReader(file)
    architecture = read.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(folder / package / file.name, architecture)
    for name, field in read.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue  # the writer's own
        value = count if name.endswith(".block_count") else field.contents()
        writer.add_key_value(name, value, field.types[0], field.types[-1])
    for tensor in read.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if block is None or int(block[1]) < count:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
