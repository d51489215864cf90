"""What a page promises: text stays text, and only its own script may run."""

import base64
import hashlib

from itjax.evaluation import page


def test_text_is_text_inside_elements_and_attributes():
    assert page.escape("<a b='c'>\"&") == "&lt;a b=&#x27;c&#x27;&gt;&quot;&amp;"


def test_only_the_script_of_the_page_may_run():
    script = "let x = 1 < 2;"
    text = page.document("a < b", "<p>c</p>", script=script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "<title>a &lt; b</title>" in text
    assert "script-src 'none'" in page.document("a", "b")
