package owner

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Another installation is refused for a day after the owner was seen, unless it takes over on purpose.
func TestCheck(t *testing.T) {
	dir, now := filepath.Join(t.TempDir(), "state"), time.Now()
	if before, err := Check(dir, "a/overlayd", "", now); before != "" || err != nil {
		t.Fatalf("a new node: %q, %v", before, err)
	}
	if err := Write(dir, "a/overlayd"); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name, own, takeOver string
		age                 time.Duration
		refused             bool
	}{
		{"its own", "a/overlayd", "", 0, false},
		{"its own, long ago", "a/overlayd", "", 90 * 24 * time.Hour, false},
		{"another's", "b/overlayd", "", 0, true},
		{"another's, a while ago", "b/overlayd", "", lasts - time.Minute, true},
		{"another's that is gone", "b/overlayd", "", lasts + time.Minute, false},
		{"another's, on purpose", "b/overlayd", "a/overlayd", 0, false},
		{"another's, with a third one's consent", "b/overlayd", "c/overlayd", 0, true},
		{"another's, by a clock that was wrong", "b/overlayd", "", -365 * 24 * time.Hour, false},
	} {
		seen := now.Add(-x.age)
		if err := os.Chtimes(File(dir), seen, seen); err != nil {
			t.Fatal(err)
		}
		_, err := Check(dir, x.own, x.takeOver, now)
		if e := (*Error)(nil); errors.As(err, &e) != x.refused || err != nil && !x.refused {
			t.Errorf("%s: %v", x.name, err)
		}
		if x.refused && (!strings.Contains(err.Error(), "--take-over=a/overlayd, or remove "+File(dir)) ||
			!strings.Contains(err.Error(), seen.Add(lasts).Format(time.RFC3339))) {
			t.Errorf("%s: it does not say what to do: %v", x.name, err)
		}
	}
}
