"""Hashes of files."""


def test_files_are_hashed_without_what_came_with_python_3_11(tmp_path, monkeypatch):
    import hashlib

    from flow_policy_rl import provenance

    monkeypatch.delattr(hashlib, "file_digest", raising=False)
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    assert provenance.file_hash(tmp_path / "file") == hashlib.sha256(bytes(3 << 20)).hexdigest()
