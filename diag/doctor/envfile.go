package doctor

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// ReadEnvFile reads a file as systemd's EnvironmentFile= does: NAME=value, comments with # or ;, quotes, and backslashes. A file
// that is not there has nothing in it. Errors name the line, and never show a value.
func ReadEnvFile(path string) (map[string]string, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out, err := parseEnv(string(raw))
	if err != nil {
		return out, fmt.Errorf("%s: %w", path, err)
	}
	return out, nil
}

func parseEnv(text string) (map[string]string, error) {
	out := map[string]string{}
	var errs []error
	t := envText{rest: text, line: 1}
	for t.skip(blank); t.rest != ""; t.skip(blank) {
		line, before := t.line, t.rest
		if c := before[0]; c == '#' || c == ';' {
			t.skip(func(c byte) bool { return !newline(c) })
			continue
		}
		t.skip(func(c byte) bool { return c != '=' && !newline(c) })
		name := strings.TrimSpace(before[:len(before)-len(t.rest)])
		c, _ := t.next()
		value := ""
		if c == '=' {
			value = t.value()
		}
		if c != '=' || name == "" || strings.ContainsAny(name, " \t\"'") {
			errs = append(errs, fmt.Errorf("line %d is not NAME=value (systemd ignores it)", line))
			continue
		}
		out[name] = value
	}
	return out, errors.Join(errs...)
}

func newline(c byte) bool { return c == '\n' || c == '\r' }
func blank(c byte) bool   { return c == ' ' || c == '\t' || newline(c) }

// envText is what is left of a file, and the number of its first line.
type envText struct {
	rest string
	line int
}

func (t *envText) next() (c byte, more bool) {
	if t.rest == "" {
		return 0, false
	}
	c, t.rest = t.rest[0], t.rest[1:]
	if c == '\n' {
		t.line++
	}
	return c, true
}

func (t *envText) skip(what func(byte) bool) {
	for t.rest != "" && what(t.rest[0]) {
		t.next()
	}
}

// value reads what stands behind the equals sign, as systemd.exec(5) has it (EnvironmentFile=). Quotes count at the beginning only, or
// behind others. Outside of quotes a backslash keeps the next character as it is, and joins lines.
func (t *envText) value() string {
	var b strings.Builder
	plain, keep := false, 0 // what is not kept is white space at the end
	for c, more := t.next(); more && !newline(c); c, more = t.next() {
		switch {
		case c == '\\':
			if c, more := t.next(); more && !newline(c) {
				b.WriteByte(c)
			}
			plain, keep = true, b.Len()
		case !plain && (c == '"' || c == '\''):
			t.quoted(&b, c)
			keep = b.Len()
		case !blank(c):
			b.WriteByte(c)
			plain, keep = true, b.Len()
		case plain:
			b.WriteByte(c)
		}
	}
	return b.String()[:keep]
}

// quoted reads up to the quote that ends it, over lines. In double quotes a backslash before one of "\`$ goes, and joins lines; before
// any other character it stays, and so it does in single quotes.
func (t *envText) quoted(b *strings.Builder, quote byte) {
	for c, more := t.next(); more && c != quote; c, more = t.next() {
		if c != '\\' || quote == '\'' {
			b.WriteByte(c)
			continue
		}
		c, more := t.next()
		switch {
		case !more:
			return
		case c == '\n':
		case strings.IndexByte("\"\\`$", c) < 0:
			b.WriteByte('\\')
			fallthrough
		default:
			b.WriteByte(c)
		}
	}
}

// readVars reads a file like subnet.env.
func readVars(path string) (map[string]string, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	return ReadEnvFile(path)
}
