"""What tests of files say often: write this, open it, read its rows and their addresses."""

from array_record.python.array_record_module import ArrayRecordWriter

from itjax.data.sources import open_files


def open_one(path, **settings):
    (source,) = open_files(str(path), **settings)
    return source


def rows(path, **settings):
    source = open_one(path, **settings)
    return [source.row(number) for number in range(len(source))]


def lines(path, **settings):
    """The addresses of all rows, without the path."""
    source = open_one(path, **settings)
    return [source.key(number).removeprefix(f"{path}:") for number in range(len(source))]


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path
