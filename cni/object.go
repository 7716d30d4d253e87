package cni

import (
	"encoding/json"
	"strings"
)

// object is a JSON object whose values stay as they were written, so that what this plugin does not know passes through
// it unchanged. Keys are found in any letter case, since the plugins that read them do so too.
type object map[string]json.RawMessage

// readObject reads what stands at a path; where nothing does, the object is empty.
func readObject(path string, raw json.RawMessage) (object, error) {
	o := object{}
	if raw == nil {
		return o, nil
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return nil, decodeError(path, err)
	}
	return o, nil
}

func (o object) get(key string) (json.RawMessage, bool) {
	if v, ok := o[key]; ok {
		return v, true
	}
	for k, v := range o {
		if strings.EqualFold(k, key) {
			return v, true
		}
	}
	return nil, false
}

func (o object) has(key string) bool {
	_, ok := o.get(key)
	return ok
}

// put sets a key, whatever stood there.
func (o object) put(key string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	for k := range o {
		if strings.EqualFold(k, key) {
			delete(o, k)
		}
	}
	o[key] = raw
	return nil
}

// offer sets a key that is not there.
func (o object) offer(key string, v any) error {
	if o.has(key) {
		return nil
	}
	return o.put(key, v)
}

// text reads a string; a key that is not there gives the default.
func (o object) text(path, key, deflt string) (string, error) {
	raw, ok := o.get(key)
	if !ok {
		return deflt, nil
	}
	var s *string
	if err := json.Unmarshal(raw, &s); err != nil || s == nil || *s == "" {
		return "", invalid("%s.%s: expected the name of a plugin, found %s", path, key, excerpt(raw))
	}
	return *s, nil
}

// flag reads a boolean; a key that is not there, or null, gives the default.
func (o object) flag(path, key string, deflt bool) (bool, error) {
	raw, _ := o.get(key)
	if given(raw) == nil {
		return deflt, nil
	}
	var b bool
	if err := json.Unmarshal(raw, &b); err != nil {
		return false, invalid("%s.%s: expected true or false, found %s", path, key, excerpt(raw))
	}
	return b, nil
}

// excerpt is the beginning of a JSON value, on one line.
func excerpt(raw json.RawMessage) string {
	const most = 60
	s := strings.Join(strings.Fields(string(raw)), " ")
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
