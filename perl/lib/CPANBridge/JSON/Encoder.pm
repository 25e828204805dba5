package CPANBridge::JSON::Encoder;

# Nothing is tracked for error messages while encoding: only if a value has no
# JSON form, a second and slower walk finds its place. That keeps the usual case fast.
#
# Objects whose DESTROY runs in Perl's global destruction make calls as well. By then Perl has taken away
# what any variable refers to if it is an object, and a qr// is one: a pattern from a variable would match
# everything. So the patterns and tables here are constants of the code, and no sub uses a variable from outside
# of itself but those that `encode` sets.

use 5.010;
use strict;
use warnings;
no warnings 'recursion';
no if $] >= 5.035, warnings => 'experimental::builtin';

use B ();
use CPANBridge::Boolean;
use CPANBridge::Error;
use Scalar::Util qw(blessed refaddr);

our $VERSION = '0.6.0';

# Data nested deeper than this is checked for references to what encloses it.
use constant WATCHED_DEPTH => 200;
use constant MAX_DEPTH     => 100_000;

use constant ESCAPES => {
    (map { chr, sprintf '\\u%04x', $_ } 0 .. 0x1f),
    '"' => '\\"', '\\' => '\\\\', "\n" => '\\n', "\r" => '\\r',
    "\t" => '\\t', "\f" => '\\f', "\b" => '\\b',
};

use constant INFINITY => 9**9**9;

# Before 5.30, Perl reads some numbers with errors in the last digit, so reading a number's text back proves nothing.
use constant READS_EXACTLY => $] >= 5.030;

# Up to here, floats that are whole numbers are sent as integers: 2**53.
use constant MAX_WHOLE => 9007199254740992;

# The most digits of an integer that arrives exactly, and of any float.
use constant MAX_DIGITS       => 4300;
use constant MAX_FLOAT_DIGITS => 767;

# The depth of the walk, and its enclosing containers (from WATCHED_DEPTH on).
our ($Depth, $Inside) = (0);

# The objects being sent, by address: a reference to the result of TO_JSON, or the error that it ended with.
# If a value is refused, the second walk takes it from here: TO_JSON is not called again.
our $Converted;

# JSON as bytes in UTF-8. Dies with a CPANBridge::Error of type InvalidParams that names the place.
sub encode {
    my ($value, $name) = @_;
    my $previous_error = $@;
    local ($Depth, $Inside, $Converted) = (0);
    my $json = eval {
        local $SIG{__DIE__} if $SIG{__DIE__};
        _value($value);
    };
    if (!defined $json) {
        my $error = $@;
        die $error if !CPANBridge::Error::is_internal($error);
        _locate($value, $name, {}, 0);
        die $error;
    }
    $@ = $previous_error;
    return $json;
}

sub _value {
    my ($value) = @_;
    if (my $type = ref $value) {
        return
              $type eq 'HASH'  ? _object($value)
            : $type eq 'ARRAY' ? _array($value)
            :                    CPANBridge::Boolean::json_name($value) || _other($value);
    }
    return 'null' if !defined $value;
    if (_is_number($value)) {
        my $text = "$value";
        # The text is JSON, and read back as the same number: Perl prints 15 digits, so the text of
        # 2.9999999999999996 is "3". Zero has a sign.
        my $is_json = READS_EXACTLY
            ? $text =~ /\A-?(?:[1-9][0-9]*(?:\.[0-9]+)?|0\.[0-9]+)\z/
            : $text =~ /\A-?[1-9][0-9]*\z/;
        return $text if $is_json && $text == $value;
        return _float($value, $text);
    }
    my $boolean = CPANBridge::Boolean::json_name($value);
    return $boolean if $boolean;
    _refuse('a glob has no JSON form') if ref \$value eq 'GLOB';
    return _string($value);
}

# In both loops, the long pattern is for strings that are sent unchanged and cannot be a number, a boolean, a glob,
# Inf or NaN: most strings.
sub _object {
    my ($hash) = @_;
    _watch($hash) if ++$Depth > WATCHED_DEPTH;
    my $json = '';
    for my $key (keys %{$hash}) {
        # Taken once: it may be tied. The copy is for matching, which before 5.36 turns a number into a string.
        my $copy = my $value = $hash->{$key};
        $json .= ',' if $json ne '';
        $json .= $key =~ /\A[ !#-\[\]-~]*\z/ ? qq("$key":) : _string($key) . ':';
        $json .= defined $copy && !ref $copy && $copy =~ /\A[!#\$%&'(),.\/:-HJ-MO-\[\]-hj-mo-~ ][ !#-\[\]-~]*\z/
            ? qq("$copy")
            : _value($value);
    }
    delete $Inside->{ refaddr $hash} if $Depth-- > WATCHED_DEPTH;
    return "{$json}";
}

sub _array {
    my ($array) = @_;
    _watch($array) if ++$Depth > WATCHED_DEPTH;
    my $json = '';
    for my $index (0 .. $#{$array}) {
        my $copy = my $value = $array->[$index];
        $json .= ',' if $index;
        $json .= defined $copy && !ref $copy && $copy =~ /\A[!#\$%&'(),.\/:-HJ-MO-\[\]-hj-mo-~ ][ !#-\[\]-~]*\z/
            ? qq("$copy")
            : _value($value);
    }
    delete $Inside->{ refaddr $array} if $Depth-- > WATCHED_DEPTH;
    return "[$json]";
}

sub _watch {
    my ($reference) = @_;
    _refuse('it refers to something that it is inside of') if $Inside->{ refaddr $reference}++;
    _refuse('nested deeper than ' . MAX_DEPTH . ' levels') if $Depth > MAX_DEPTH;
    return;
}

# Objects that have a JSON form.
sub _other {
    my ($reference) = @_;
    return _exact($reference) if _is_exact_number($reference);
    my $converted = _converted($reference);
    $Converted->{ refaddr $reference} = \$converted;
    _watch($reference) if ++$Depth > WATCHED_DEPTH;
    my $json = _value($converted);
    delete $Converted->{ refaddr $reference};
    delete $Inside->{ refaddr $reference} if $Depth-- > WATCHED_DEPTH;
    return $json;
}

# Whether it is a Math::BigInt, Math::BigFloat or Math::BigRat. (The latter two inherit, and deny it.) A class of
# fractions that has TO_JSON, such as one of amounts with a currency, knows better.
sub _is_exact_number {
    my ($reference) = @_;
    return blessed $reference
        && ($reference->isa('Math::BigInt')
            || ($reference->isa('Math::BigFloat') || $reference->isa('Math::BigRat')) && !$reference->can('TO_JSON'));
}

# The JSON of such a number, if what arrives is that number.
sub _exact {
    my ($number) = @_;
    my ($digits, $exponent) = _decimal($number);
    if ($exponent >= 0) {
        my $length = ($digits =~ tr/0-9//) + $exponent;
        _refuse("an integer of $length digits; at most " . MAX_DIGITS . ' arrive exactly') if $length > MAX_DIGITS;
        return $digits . '0' x $exponent;
    }
    my ($sign, $places) = ($digits =~ s/\A-// ? '-' : '', -$exponent);
    if (!_is_float($digits, $exponent)) {
        my $shown = length $digits > 60 ? substr($digits, 0, 60) . '...' : $digits;
        _refuse("no float is exactly $sign${shown}e$exponent; round it, or send it as a string");
    }
    return "$sign${digits}e$exponent" if $places > 30;
    $digits = '0' x ($places + 1 - length $digits) . $digits if length $digits <= $places;
    return $sign . substr($digits, 0, -$places) . '.' . substr $digits, -$places;
}

# The number's digits, with a sign if it is negative, and the exponent of 10 of the last of them.
sub _decimal {
    my ($number) = @_;
    my $text = eval {
        # What the script has set for its own calculations must not round what is sent.
        no warnings 'once';
        local ($Math::BigInt::accuracy, $Math::BigFloat::accuracy, $Math::BigRat::accuracy);
        local ($Math::BigInt::precision, $Math::BigFloat::precision, $Math::BigRat::precision);
        local ($Math::BigInt::upgrade, $Math::BigInt::downgrade, $Math::BigFloat::downgrade);
        $number->isa('Math::BigRat') ? _decimal_of_fraction($number)
            : $number->isa('Math::BigFloat') ? $number->bsstr
            :                                  $number->bstr;
    };
    if (!defined $text) {
        die $@ if CPANBridge::Error::is_internal($@);
        _refuse('the value of a ' . ref($number) . " cannot be read: $@");
    }
    my ($digits, $exponent) = $text =~ /\A(-?[0-9]+)(?:e([-+]?[0-9]+))?\z/ or _refuse("$text has no JSON form");
    return (0, 0) if $digits !~ /[1-9]/;
    $exponent = 0 if !defined $exponent;
    $exponent += length $1 if $exponent < 0 && $digits =~ s/(0+)\z//;
    return ($digits, $exponent);
}

sub _decimal_of_fraction {
    my ($number) = @_;
    my $text = $number->bstr;
    my ($numerator, $divisor) = $text =~ m{\A(-?[0-9]+)/([0-9]+)\z} or return $text;
    ($numerator, $divisor) = map { Math::BigInt->new($_) } $numerator, $divisor;
    my %power = (2 => 0, 5 => 0);
    for my $factor (keys %power) {
        while ($divisor->copy->bmod($factor)->is_zero) {
            $divisor->bdiv($factor);
            $power{$factor}++;
        }
    }
    _refuse("no float is exactly $text; round it to a decimal number, or send it as a string") if !$divisor->is_one;
    my $places = $power{2} > $power{5} ? $power{2} : $power{5};
    $numerator->bmul(Math::BigInt->new($_)->bpow($places - $power{$_})) for keys %power;
    return $numerator->bstr . "e-$places";
}

# Whether a number is the one that a float shows: whether the nearest float, with as many digits, has these.
sub _is_float {
    my ($digits, $exponent) = @_;
    return 0 if length $digits > MAX_FLOAT_DIGITS;
    my $float = 0 + "${digits}e$exponent";
    my ($first, $others, $power)
        = sprintf('%.*e', length($digits) - 1, $float) =~ /\A([0-9])[^0-9]?([0-9]*)e([-+][0-9]+)\z/;
    return defined $power && "$first$others" eq $digits && $power - length($others) == $exponent;
}

# The result of an object's TO_JSON.
sub _converted {
    my ($reference) = @_;
    my $class = blessed $reference;
    if (!defined $class) {
        my $type = ref $reference;
        _refuse("a reference to a scalar has no JSON form, but \\1 and \\0")
            if $type eq 'SCALAR' || $type eq 'REF';
        _refuse("a $type reference has no JSON form");
    }
    _refuse("an object of class $class without a TO_JSON method has no JSON form")
        if !$reference->can('TO_JSON');
    my $converted;
    return $converted if eval { $converted = $reference->TO_JSON; 1 };
    my $error = $@;
    $Converted->{ refaddr $reference}
        = CPANBridge::Error->new(message => "TO_JSON of class $class died: $error", error_type => 'InvalidParams');
    die $Converted->{ refaddr $reference};
}

sub _string {
    my ($string) = @_;
    $string =~ s/(["\\\x00-\x1f])/ESCAPES->{$1}/ge;
    if ($string =~ /[^\x00-\x7f]/) {
        utf8::encode($string);
        # In UTF-8 these are the surrogates and what is above U+10FFFF.
        _refuse('a code point from U+D800 to U+DFFF (half of a pair) is not a character')
            if $string =~ /\xed[\xa0-\xbf]/;
        _refuse('a code point above U+10FFFF is not a character')
            if $string =~ /\xf4[\x90-\xbf]/ || $string =~ /[\xf5-\xff]/;
    }
    return qq("$string");
}

# Whether a scalar was made as a number. From 5.36 on, a number that was printed is still one to Perl;
# before, a number that was used as a string counts as a string, as in all JSON modules.
*_is_number = defined &builtin::created_as_number
    ? \&builtin::created_as_number
    : sub {
        my $flags = B::svref_2object(\$_[0])->FLAGS;
        return $flags & (B::SVp_IOK() | B::SVp_NOK()) && !($flags & B::SVp_POK());
    };

# Perl's own text of a number if it is read back as the same number, or else 17 digits, which
# always are.
sub _float {
    my ($number, $text) = @_;
    if ($number == 0) {
        return sprintf('%g', $number) eq '-0' ? '-0.0' : '0';
    }
    return sprintf '%.0f', $number if abs $number <= MAX_WHOLE && $number == int $number;
    return $text
        if READS_EXACTLY
        && $text == $number
        && $text =~ /\A-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?\z/;
    _refuse('NaN has no JSON form') if $number != $number;
    _refuse('an infinite number has no JSON form')
        if $number == INFINITY || $number == -INFINITY;
    $text = sprintf '%.17g', $number;
    $text =~ tr/,/./;    # a locale's decimal comma
    return $text;
}

sub _refuse {
    my ($reason) = @_;
    die CPANBridge::Error->new(message => $reason, error_type => 'InvalidParams');
}

# Dies with the place of the first thing that can't be encoded.
sub _locate {
    my ($value, $path, $inside, $depth) = @_;
    my $arrow = $depth ? '' : '->';
    my $type  = ref $value;
    if ($type eq 'HASH' || $type eq 'ARRAY') {
        _refuse_at($path, 'it refers to something that it is inside of') if $inside->{ refaddr $value};
        _refuse_at(substr($path, 0, 60) . '...', 'nested deeper than ' . MAX_DEPTH . ' levels')
            if $depth > MAX_DEPTH;
        local $inside->{ refaddr $value} = 1;
        if ($type eq 'HASH') {
            for my $key (sort keys %{$value}) {
                my $shown = $key =~ /\A[A-Za-z_][A-Za-z_0-9]*\z/ ? $key : _quoted($key);
                _try(sub { _string($key) }, "the key $shown of $path");
                _locate($value->{$key}, "$path$arrow\{$shown\}", $inside, $depth + 1);
            }
        }
        else {
            _locate($value->[$_], "$path$arrow\[$_\]", $inside, $depth + 1) for 0 .. $#{$value};
        }
        return;
    }
    if (blessed $value && !CPANBridge::Boolean::json_name($value) && !_is_exact_number($value)) {
        _refuse_at($path, 'TO_JSON leads back to the same object') if $inside->{ refaddr $value};
        local $inside->{ refaddr $value} = 1;
        return _try(sub { _converted($value) }, $path) if !$value->can('TO_JSON');
        my $converted = $Converted->{ refaddr $value};
        return if !$converted;    # neither the refused value nor a container of it
        _refuse_at($path, $converted->message) if CPANBridge::Error::is_internal($converted);
        return _locate(${$converted}, $path, $inside, $depth + 1);
    }
    _try(sub { _value($value) }, $path);
    return;
}

sub _try {
    my ($code, $path) = @_;
    my $result = eval { [ $code->() ] };
    return $result->[0] if $result;
    my $error = $@;
    die $error if !CPANBridge::Error::is_internal($error);
    _refuse_at($path, $error->message);
}

sub _refuse_at {
    my ($path, $reason) = @_;
    _refuse("$path cannot be sent: $reason");
}

# A key as Perl source, in ASCII and not too long.
sub _quoted {
    my ($key) = @_;
    $key = substr($key, 0, 40) . '...' if length $key > 43;
    $key =~ s/([^ -~])/sprintf '\\x{%x}', ord $1/ge;
    return "'$key'";
}

1;

__END__

=head1 NAME

CPANBridge::JSON::Encoder - Perl data to JSON, without a change to any value

=head1 FUNCTIONS

=over

=item encode($data, $name)

The JSON of C<$data>, as bytes in UTF-8. Dies with a L<CPANBridge::Error> if something in it has no
JSON form; its message tells where that is, as in C<< $params->{rows}[3] cannot be sent: >>, with
C<$name> for what C<$data> is called.

=back

L<CPANBridge/DATA> has the rules.

=cut
