# Flattens JSON into lines of "path<TAB>value", such as "/links/0/mtu<TAB>1450".
# Newlines within strings become spaces; \u escapes stay as they are.
function advance() {
    token = ""
    if (match(text, /^[ \t\r\n]*("([^"\\]|\\.)*"|[][{},:]|[^][{},:" \t\r\n]+)/)) {
        token = substr(text, 1, RLENGTH)
        text = substr(text, RLENGTH + 1)
        sub(/^[ \t\r\n]+/, "", token)
    }
}
function plain(string) {
    if (string !~ /^"/) return string
    string = substr(string, 2, length(string) - 2)
    gsub(/\\\\/, "\001", string)
    gsub(/\\[nrt]/, " ", string)
    gsub(/\\"/, "\"", string)
    gsub(/\\\//, "/", string)
    gsub(/\001/, "\\", string)
    return string
}
function value(path,    key, count) {
    if (token == "{") {
        for (advance(); token != "}" && token != ""; ) {
            key = plain(token)
            advance()
            advance()
            value(path "/" key)
            if (token == ",") advance()
        }
        advance()
    } else if (token == "[") {
        count = 0
        for (advance(); token != "]" && token != ""; ) {
            value(path "/" count++)
            if (token == ",") advance()
        }
        advance()
    } else {
        print path "\t" plain(token)
        advance()
    }
}
{ text = text $0 "\n" }
END { advance(); if (token != "") value("") }
