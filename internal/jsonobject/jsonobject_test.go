package jsonobject

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
)

func TestObject(t *testing.T) {
	t.Parallel()
	var o Object
	if err := json.Unmarshal([]byte(` {"Type":"a", "TYPE":"b", "type":null, "n":null, "big":12345678901234567890} `),
		&o); err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"type": `"b"`, "N": "null", "big": "12345678901234567890", "none": ""} {
		if got := o.Get(key); string(got) != want {
			t.Errorf("%s: got %s, want %s", key, got, want)
		}
	}
	v := 7
	for _, absent := range []string{"n", "none"} {
		if err := o.Decode(absent, &v, "a number"); err != nil || v != 7 {
			t.Errorf("%s: got %d, %v", absent, v, err)
		}
	}
	if err := o.Decode("Type", &v, "a number"); err == nil || err.Error() != `Type: expected a number, found "b"` {
		t.Errorf("got %v", err)
	}
	o.Delete("N")
	if err := o.Put("type", []int{1}); err != nil {
		t.Fatal(err)
	}
	if got, err := json.Marshal(o); err != nil || string(got) != `{"big":12345678901234567890,"type":[1]}` {
		t.Errorf("got %s, %v", got, err)
	}
}

func TestNoObject(t *testing.T) {
	t.Parallel()
	var o Object
	if err := json.Unmarshal([]byte("null"), &o); err != nil || o != nil {
		t.Errorf("null: %v, %v", o, err)
	}
	var wrong *json.UnmarshalTypeError
	if err := json.Unmarshal([]byte("[]"), &o); !errors.As(err, &wrong) || wrong.Value != "array" {
		t.Errorf("got %v", err)
	}
	if err := json.Unmarshal([]byte("{}"), &o); err != nil || o == nil {
		t.Errorf("an empty object: %v, %v", o, err)
	}
}

func TestExcerpt(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		" \n":                      "nothing",
		"{\n  \"dst\": \"x y\"\n}": `{"dst":"x y"}`,
		"text":                     `"text"`,
		"\"\u2028\"":               `"\"\u2028\""`,
		strings.Repeat("1", 50):    `"` + strings.Repeat("1", 40) + `"…`,
	} {
		if got := Excerpt([]byte(in)); got != want {
			t.Errorf("Excerpt(%q) = %s, want %s", in, got, want)
		}
	}
}
