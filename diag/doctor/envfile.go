package doctor

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/overlayd/overlayd/internal/ownfile"
)

// ReadEnvFile reads a file as systemd's EnvironmentFile= does: NAME=value, comments with # or ;, quotes, and
// backslashes. A file that does not exist has nothing in it. Errors name the line, and never show a value.
func ReadEnvFile(path string) (map[string]string, error) {
	return readEnv(path, os.ReadFile)
}

// readSubnetEnv reads subnet.env, if overlay-cni would.
func readSubnetEnv(path string) (map[string]string, error) {
	return readEnv(path, func(path string) ([]byte, error) { return ownfile.ReadLinked(path, 64<<10) })
}

func readEnv(path string, read func(string) ([]byte, error)) (map[string]string, error) {
	raw, err := read(path)
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

// parseEnv follows systemd.exec(5). Quotes count at the beginning of a value only, or behind others; they may go over
// lines.
func parseEnv(text string) (map[string]string, error) {
	const (
		quotes = `"((?:\\(?s:.?)|[^"\\])*)(?:"|\z)|'([^']*)(?:'|\z)`
		plain  = `((?:\\(?s:.?)|[^\\\n\r])*?)[ \t]*(?:[\n\r]|\z)`
		blanks = " \t\r\n"
	)
	quoted, assignment := regexp.MustCompile(quotes), regexp.MustCompile(`^([^=\n\r]*)=((?:[ \t]|`+quotes+`)*)`+plain)
	out := map[string]string{}
	var errs []error
	for rest := strings.TrimLeft(text, blanks); rest != ""; rest = strings.TrimLeft(rest, blanks) {
		line := 1 + strings.Count(text[:len(text)-len(rest)], "\n")
		m := assignment.FindStringSubmatch(rest)
		if comment := rest[0] == '#' || rest[0] == ';'; comment || m == nil {
			if !comment {
				errs = append(errs, noAssignment(line))
			}
			rest = rest[strings.IndexAny(rest+"\n", "\r\n"):]
			continue
		}
		rest = rest[len(m[0]):]
		name := strings.TrimSpace(m[1])
		if name == "" || strings.ContainsAny(name, " \t\"'") {
			errs = append(errs, noAssignment(line))
			continue
		}
		value := ""
		for _, q := range quoted.FindAllStringSubmatch(m[2], -1) {
			value += unescape(q[1], "\"\\`$") + q[2]
		}
		out[name] = value + unescape(m[5], "")
	}
	return out, errors.Join(errs...)
}

func noAssignment(line int) error {
	return fmt.Errorf("line %d is not NAME=value (systemd ignores it)", line)
}

// unescape removes backslashes, which join lines, or keep the next character as it is: only one of these, if any is
// given.
func unescape(s, only string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	return regexp.MustCompile(`\\(?s:.?)`).ReplaceAllStringFunc(s, func(e string) string {
		c := e[1:]
		if only == "" && c == "\r" || c == "\n" {
			return ""
		}
		if only != "" && c != "" && !strings.Contains(only, c) {
			return e
		}
		return c
	})
}
