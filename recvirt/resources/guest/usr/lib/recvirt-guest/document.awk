# The texts below one key at the top of a document, one a line; without a key, the keys at the top.
#
# Reads JSON, and of YAML what such documents use: "key: value", "key: [a, b]", and "- value" lines below a key, plain or
# in quotes. Deeper blocks give the texts of their last level. A text with a line break or NUL in it is left out.

function fail() {
    bad = 1
    exit 1
}

function utf8(code) {
    if (code < 32 || code == 127)
        return sprintf("%c", 10)
    if (code < 128)
        return sprintf("%c", code)
    # What is beyond ASCII only stands in comments of keys.
    return "?"
}

function hex(text, i, n) {
    n = 0
    for (i = 1; i <= length(text); i++)
        n = n * 16 + index("0123456789abcdef", tolower(substr(text, i, 1))) - 1
    return n
}

# A text in double quotes at the beginning of ``rest``, which loses it.
function quoted(out, c, e) {
    out = ""
    rest = substr(rest, 2)
    while (match(rest, /["\\]/)) {
        out = out substr(rest, 1, RSTART - 1)
        c = substr(rest, RSTART, 1)
        e = substr(rest, RSTART + 1, 1)
        rest = substr(rest, RSTART + 1)
        if (c == "\"")
            return out
        rest = substr(rest, 2)
        if (e == "u") {
            if (substr(rest, 1, 4) !~ /^[0-9A-Fa-f][0-9A-Fa-f][0-9A-Fa-f][0-9A-Fa-f]$/)
                fail()
            out = out utf8(hex(substr(rest, 1, 4)))
            rest = substr(rest, 5)
        } else if (e == "t")
            out = out "\t"
        else if (e ~ /[nrbf]/)
            out = out "\n"
        else
            out = out e
    }
    fail()
}

# The same in single quotes, where two of them stand for one.
function single(out) {
    out = ""
    rest = substr(rest, 2)
    while (match(rest, /'/)) {
        out = out substr(rest, 1, RSTART - 1)
        rest = substr(rest, RSTART + 1)
        if (substr(rest, 1, 1) != "'")
            return out
        out = out "'"
        rest = substr(rest, 2)
    }
    fail()
}

function blank() {
    sub(/^[ \t\r\n]+/, "", rest)
}

function give(text) {
    if (wanted && text != "" && text !~ /[\n\r]/)
        print text
}

# A scalar of a flow: quoted, or up to what ends it there.
function scalar(out) {
    if (substr(rest, 1, 1) == "\"")
        return quoted()
    if (substr(rest, 1, 1) == "'")
        return single()
    match(rest, /^[^],}:\n]*(:[^], }\n][^],}:\n]*)*/)
    out = substr(rest, 1, RLENGTH)
    rest = substr(rest, RLENGTH + 1)
    sub(/[ \t\r]+$/, "", out)
    return out
}

# A value of a flow (JSON is one): its texts are given if they are wanted.
function flow(depth, c, name) {
    if (depth > 20)
        fail()
    blank()
    c = substr(rest, 1, 1)
    if (c == "[") {
        rest = substr(rest, 2)
        for (;;) {
            blank()
            if (substr(rest, 1, 1) == "]")
                break
            if (rest == "")
                fail()
            flow(depth + 1)
            blank()
            if (substr(rest, 1, 1) == ",")
                rest = substr(rest, 2)
            else if (substr(rest, 1, 1) != "]")
                fail()
        }
        rest = substr(rest, 2)
    } else if (c == "{") {
        rest = substr(rest, 2)
        for (;;) {
            blank()
            if (substr(rest, 1, 1) == "}")
                break
            if (rest == "")
                fail()
            name = scalar()
            blank()
            if (substr(rest, 1, 1) != ":")
                fail()
            rest = substr(rest, 2)
            if (depth == 0)
                top(name)
            flow(depth + 1)
            blank()
            if (substr(rest, 1, 1) == ",")
                rest = substr(rest, 2)
            else if (substr(rest, 1, 1) != "}")
                fail()
        }
        rest = substr(rest, 2)
    } else
        give(scalar())
}

function top(name) {
    if (key == "") {
        wanted = 0
        print name
    } else
        wanted = (name == key)
}

# One line's value in block style, with its comment taken away.
function value(text) {
    rest = text
    blank()
    if (rest == "" || rest ~ /^[#|>&!*]/)
        return
    if (rest ~ /^[[{]/)
        flow(1)
    else if (rest ~ /^["']/)
        give(scalar())
    else {
        sub(/[ \t]+#.*$/, "", rest)
        sub(/[ \t\r]+$/, "", rest)
        give(rest)
    }
}

{ text = text $0 "\n" }

END {
    if (bad)
        exit 1
    wanted = 0
    rest = text
    while (rest ~ /^([ \t\r]*(#[^\n]*)?\n|---[ \t\r]*\n)/)
        sub(/^[^\n]*\n/, "", rest)
    if (rest ~ /^[ \t]*[{]/) {
        flow(0)
        exit 0
    }
    count = split(rest, lines, "\n")
    for (number = 1; number <= count; number++) {
        line = lines[number]
        if (line ~ /^[A-Za-z_][A-Za-z0-9_.-]*[ \t]*:([ \t\r]|$)/) {
            name = line
            sub(/[ \t]*:.*$/, "", name)
            top(name)
            sub(/^[^:]*:/, "", line)
            value(line)
        } else if (line ~ /^[ \t]*-[ \t]/) {
            sub(/^[ \t]*-[ \t]+/, "", line)
            if (line ~ /^[A-Za-z_][A-Za-z0-9_-]*:[ \t]/)
                sub(/^[^:]*:[ \t]+/, "", line)
            value(line)
        } else if (line ~ /^[ \t]+[A-Za-z0-9_][A-Za-z0-9_-]*:[ \t]/) {
            sub(/^[^:]*:[ \t]+/, "", line)
            value(line)
        }
    }
}
