"""Text that tries to be more than text, and names that do not fit."""

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> & \x00\x1b[31m \"quoted\" 'too'"
NAMES = ["grpo", "<b>&\"'", "$\\frac{1}{2}$", "package.with.a.very.long.dotted.path.to_a_function"]
