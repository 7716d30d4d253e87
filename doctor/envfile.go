package doctor

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// ReadEnvFile reads a file as systemd's EnvironmentFile= does: NAME=value, comments with # or ;, quotes, and a backslash at the end of
// a line. A file that is not there has nothing in it. Errors name the line, and never show a value.
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
	number := 0
	for text != "" {
		var line string
		line, text, _ = strings.Cut(text, "\n")
		number++
		first := number
		for strings.HasSuffix(line, "\\") && text != "" {
			var next string
			next, text, _ = strings.Cut(text, "\n")
			line = strings.TrimSuffix(line, "\\") + next
			number++
		}
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name = strings.TrimSpace(name)
		if !ok || name == "" || strings.ContainsAny(name, " \t\"'") {
			errs = append(errs, fmt.Errorf("line %d is not of the form NAME=value (systemd leaves it out)", first))
			continue
		}
		out[name] = unquote(strings.TrimSpace(value))
	}
	return out, errors.Join(errs...)
}

// unquote takes quotes off, and backslashes: outside of quotes and in double ones they keep the next character as it is.
func unquote(s string) string {
	var b strings.Builder
	quote := byte(0)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && quote != '\'' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		case quote != 0 && c == quote:
			quote = 0
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// readVars reads a file like subnet.env.
func readVars(path string) (map[string]string, error) {
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	return ReadEnvFile(path)
}
